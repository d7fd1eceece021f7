"""The one table of C entry points and of threads: which touch guest memory, which may wait, and where they may run.

``docs/threads.md`` is this table as a page. ``tests/test_docs_threads.py`` holds it against the C sources, by their
call graph, and against every call in Python.
"""

from __future__ import annotations

from enum import Enum, StrEnum


class Thread(StrEnum):
    """Names of our threads, as /proc/PID/task/TID/comm shows them (15 bytes at most)."""

    HOP = "vpc-hop"
    LATE = "vpc-late"
    PUMP = "vpc-pump"
    FAULT = "vpc-fault"
    LOAD = "vpc-load"
    SOURCE = "vpc-source"
    DRIVER = "vpc-driver"
    FAR = "vpc-far"
    BLOCKS = "vpc-blocks"
    FILE = "vpc-file"
    VCPU = "vpc-vcpu"
    DIRTY = "vpc-dirty"
    TERMINAL = "vpc-terminal"
    #: One that was borrowed and waits to be borrowed again.
    IDLE = "vpc-idle"


class Use(Enum):
    """How Python may call an entry."""

    #: At once, on any thread.
    PLAIN = "anywhere"
    #: Touches only what it knows to be resident.
    RESIDENT = "anywhere, only what is resident"
    #: By ``Gate.call`` (``Queue.touch``), or with the flag VPC_TRY.
    GATE = "the gate"
    #: A long call on a thread of its own, by ``run_loop``.
    OWN_THREAD = "a thread of its own"
    #: The same; it waits for descriptors only.
    LOOP = "a thread of its own, for descriptors only"
    #: The same; it touches RAM blocks where no page of them is missing.
    CALM_LOOP = "a thread of its own, where nothing is missing"
    #: RAM blocks of the front-end's guest: a thread call with a limiter of the owner's.
    HOP = "a thread call"

    @property
    def touches(self) -> bool:
        return self in (Use.RESIDENT, Use.CALM_LOOP) or self.may_wait

    @property
    def may_wait(self) -> bool:
        return self in (Use.GATE, Use.OWN_THREAD, Use.HOP)


_TABLE = {
    Use.GATE: """
        vpc_vq_pop vpc_vq_push vpc_vq_enable_notify vpc_chain_load vpc_chain_touch
        vpc_chain_read vpc_chain_write
    """,
    Use.OWN_THREAD: "vpc_pump_in vpc_pump_out vpc_driver_run vpc_vcpu_run",
    Use.HOP: """
        vpc_driver_reset vpc_driver_post vpc_driver_reap vpc_driver_look
        vpc_ram_read vpc_ram_write vpc_ram_fill vpc_ram_verify
        vpc_vcpu_fill vpc_vcpu_sweep
    """,
    Use.LOOP: "vpc_fault_run vpc_far_run vpc_save_wait vpc_dirty_run",
    # A page source's own blocks have all their pages; a load writes through its mapping only before LISTEN.
    Use.CALM_LOOP: "vpc_save_run vpc_save_round vpc_load_run",
    # Looks with VPC_TRY whether the used ring is there.
    Use.RESIDENT: "vpc_vq_disable_notify",
    Use.PLAIN: """
        vpc_thread_name
        vpc_uffd_open vpc_uffd_api vpc_uffd_register vpc_uffd_unregister vpc_uffd_wake vpc_uffd_copy
        vpc_uffd_zero vpc_uffd_read
        vpc_supply_new vpc_supply_unref vpc_supply_arm vpc_supply_disarm vpc_supply_fail
        vpc_supply_asleep vpc_supply_is_lost vpc_supply_strike_fd vpc_supply_struck
        vpc_supply_stats vpc_fd_kind vpc_map_new vpc_map_unref vpc_map_address
        vpc_map_kind vpc_map_register vpc_gm_new vpc_gm_unref vpc_gm_add vpc_gm_users vpc_gm_has_user
        vpc_gm_end vpc_log_new vpc_log_unref vpc_mlock_future
        vpc_vq_new vpc_vq_free vpc_vq_set_features vpc_vq_set_memory vpc_vq_set_ring vpc_vq_set_log
        vpc_vq_set_base vpc_vq_base vpc_vq_used vpc_vq_set_call vpc_vq_signal vpc_vq_stop vpc_vq_error
        vpc_chain_free vpc_chain_rebase vpc_vq_unpop vpc_inflight_new vpc_inflight_unref
        vpc_vq_set_inflight vpc_vq_again vpc_pump_new vpc_pump_free vpc_pump_stop
        vpc_pump_clear vpc_pump_drop vpc_pump_stats vpc_event_signal vpc_event_clear
        vpc_ram_new vpc_ram_free vpc_ram_add vpc_ram_base vpc_ram_set_bits vpc_ram_test_bit
        vpc_ram_count_bits vpc_ram_discard vpc_ram_born vpc_ram_set_local vpc_ram_discards vpc_ram_give_up
        vpc_ram_is_lost
        vpc_fault_new vpc_fault_free vpc_fault_add_client vpc_fault_set_ranges vpc_fault_remove_client
        vpc_fault_set_return_path vpc_fault_send vpc_fault_stop vpc_fault_client_stats vpc_fault_stats
        vpc_fault_waiting vpc_histogram_floor vpc_load_new vpc_load_free vpc_load_stop vpc_load_stats
        vpc_load_keep_holes vpc_load_feed vpc_load_take vpc_load_follow vpc_load_block vpc_load_set_block
        vpc_scan_new vpc_scan_free vpc_scan_set_rate vpc_scan_hold_all vpc_scan_keep_zeros vpc_scan_stats
        vpc_save_new vpc_save_free vpc_save_stop vpc_save_kick vpc_save_stats vpc_save_notify_fd
        vpc_save_set_tail vpc_save_switch
        vpc_driver_new vpc_driver_free vpc_driver_add_region vpc_driver_move vpc_driver_stop
        vpc_driver_stats vpc_far_new vpc_far_free vpc_far_stop vpc_far_stats
        vpc_fault_threads vpc_vcpu_new vpc_vcpu_free vpc_vcpu_add_area vpc_vcpu_set_state vpc_vcpu_state
        vpc_vcpu_set_rates vpc_vcpu_arm vpc_vcpu_go vpc_vcpu_stop vpc_vcpu_end vpc_vcpu_parked vpc_vcpu_parked_fd
        vpc_vcpu_stats
        vpc_dirty_new vpc_dirty_free vpc_dirty_start vpc_dirty_sync vpc_dirty_stop vpc_dirty_end
        vpc_dirty_stats vpc_driver_unseen vpc_driver_save vpc_driver_load vpc_ram_merge_log
        vpc_fault_trace vpc_fault_traced vpc_ram_count_cells vpc_ram_count_owed vpc_fault_settle
    """,
}

ENTRIES = {name: use for use, names in _TABLE.items() for name in names.split()}
