"""The differences between QEMU's versions, as far as we follow them: one :class:`Dialect` for each.

Nothing else compares versions: other code reads the field that describes a difference. Behaviour that depends on the
machine type instead of the program is in :meth:`Dialect.of_machine`.
Source: QEMU, docs/devel/migration and its QMP reference; all as recorded from 7.2.22, 10.0.2 and 11.1.3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

Compat = Literal["7.2", "10.0", "11.1"]
"""The QEMU version whose behaviour is followed where versions differ."""
DEFAULT: Compat = "10.0"

_MACHINE_VERSION = re.compile(r"-(\d+)\.\d+$")


@dataclass(frozen=True)
class Dialect:
    """The messages, arguments and behaviour of one version of QEMU. Names are QEMU's, in its order."""

    version: tuple[int, int, int]

    # Options.
    capabilities: tuple[str, ...]
    deprecated_capabilities: tuple[str, ...]
    """As ``query-qmp-schema`` marks them."""
    conflicts: tuple[tuple[str, str, str], ...]
    """(capability, another that conflicts with it, the refusal), checked in this order."""
    needs: tuple[tuple[str, str, str], ...]
    """(capability, another that it needs, the refusal), checked first."""
    parameters: tuple[str, ...]
    ignored_parameters: frozenset[str]
    """Accepted, but the old value is kept."""
    subjects: tuple[str, tuple[tuple[str, str], ...]]
    """The beginning of the refusal of a value, with ``{}`` for the parameter, and the parameters with another one."""
    hyphens: bool
    """In such sentences a parameter has its name; otherwise one with underscores."""
    modes: tuple[str, ...]
    """Values of the parameter ``mode``."""
    null_parameters: bool
    """``query-migrate-parameters`` may have null for a string."""

    preempt_before_incoming: bool
    """``postcopy-preempt`` is refused once a destination listens."""

    # Statuses.
    statuses: tuple[str, ...]
    device_status: bool
    """A source whose machine has stopped is ``device``."""
    postcopy_before_stop: bool
    """A source is ``postcopy-active`` before its machine has stopped; otherwise when the package has been sent."""
    setup_while_listening: bool
    """A listening destination is ``setup``; otherwise it is still ``none``, and only an event says ``setup``."""
    precopy_passes_only: bool
    """MIGRATION_PASS is sent for the passes of a precopy, neither for the scan before them nor for the last one."""

    # query-migrate.
    error_before_failed: bool
    """A source reports ``error-desc`` in every status, not only when it has failed."""
    downtime_in_postcopy: bool
    """A source reports ``downtime`` as soon as the machine runs elsewhere, in place of ``expected-downtime``."""
    address_after_listening: bool
    """A destination reports ``socket-address`` also when its migration has ended."""
    skipped_pages: bool
    """``ram`` has ``skipped``, always 0."""
    remaining: bool
    """It has ``remaining`` beside ``ram``."""
    latency: bool
    """Beside block time it has latencies, in nanoseconds and by their powers of two."""
    blocktime_of_precopy: bool
    """A destination that advised postcopy reports block time although everything came by precopy: none."""

    # Commands.
    migrate_flags: tuple[str, ...]
    channels: bool
    """``migrate`` and ``migrate-incoming`` accept ``channels`` in place of ``uri``."""
    exit_on_error: bool
    """``migrate-incoming`` accepts ``exit-on-error``; a destination that has failed can listen again."""
    singlestep: bool
    """``query-status`` has ``singlestep``."""
    globals: tuple[str, ...]
    """Lines of the text monitor's ``info migrate``: settings of a machine type that determine its stream format."""
    grouped_info: bool
    """``info migrate`` has several numbers on a line, and the lines above only with ``-a``."""
    parameter_is_rest: bool
    """``migrate_set_parameter`` of the text monitor takes the rest of the line, with its quotes."""
    parameters_in_text: tuple[str, ...]
    """The parameters of ``info migrate_parameters``, in its order."""
    postcopy_bandwidth_unit: str
    """Of ``max-postcopy-bandwidth`` there."""

    pause_refusal: str
    """Of ``migrate-pause``."""

    # Addresses.
    file_addresses: bool
    """``file:``"""
    empty_fd_name: bool
    """``fd:`` without a name is an address (of nothing)."""
    fd_of_file: bool
    """``fd:`` may be a regular file."""
    inet_options: tuple[str, ...]
    """Options allowed behind ``tcp:HOST:PORT``, if others are refused; none: anything is allowed."""
    keep_alive: tuple[str, ...]
    """Numbers of a TCP connection that is kept alive, in an address."""
    unknown_address: str
    """The refusal of ``migrate``, with ``{uri}``."""

    # The stream; of the newest machine type, see of_machine().
    switchover_start: bool
    """SWITCHOVER_START is sent when the machine has stopped."""
    preempt_first: bool
    """With postcopy-preempt the second connection is made behind the first, and ends with a closing word; otherwise it
    is made when postcopy begins, and the destination ends it."""
    loaded_ping: bool
    """A package has PING 0x42 before RUN: a source is ``postcopy-device`` until its PONG, a destination until RUN."""

    def spelt(self, parameter: str) -> str:
        """A parameter's name as the refusal of a value has it."""
        return parameter if self.hyphens else parameter.replace("-", "_")

    def subject(self, parameter: str) -> str:
        """The beginning of the refusal of a value."""
        form, others = self.subjects
        return dict(others).get(parameter) or form.format(self.spelt(parameter))

    def of_machine(self, machine: str) -> Dialect:
        """The same with a machine type, which keeps QEMU's behaviour of its time.

        For a type without a version nothing is sent that an older QEMU does not know: the stream may go to one.
        """
        found = _MACHINE_VERSION.search(machine)
        made_by = int(found[1]) if found else 0
        return replace(
            self,
            switchover_start=self.switchover_start and made_by >= 10,
            preempt_first=self.preempt_first or 0 < made_by < 8,
        )


_CAPABILITIES_7_2 = (
    "xbzrle rdma-pin-all auto-converge zero-blocks compress events postcopy-ram x-colo release-ram block "
    "return-path pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate "
    "x-ignore-shared validate-uuid background-snapshot zero-copy-send postcopy-preempt"
)
_CAPABILITIES_10_0 = (
    "xbzrle rdma-pin-all auto-converge zero-blocks events postcopy-ram x-colo release-ram "
    "return-path pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate "
    "x-ignore-shared validate-uuid background-snapshot zero-copy-send postcopy-preempt "
    "switchover-ack dirty-limit mapped-ram"
)
_PARAMETERS_7_2 = (
    "announce-initial announce-max announce-rounds announce-step compress-level compress-threads "
    "compress-wait-thread decompress-threads throttle-trigger-threshold cpu-throttle-initial "
    "cpu-throttle-increment cpu-throttle-tailslow tls-creds tls-hostname tls-authz max-bandwidth downtime-limit "
    "x-checkpoint-delay block-incremental multifd-channels xbzrle-cache-size max-postcopy-bandwidth "
    "max-cpu-throttle multifd-compression multifd-zlib-level multifd-zstd-level block-bitmap-mapping"
)
_PARAMETERS_10_0 = (
    "announce-initial announce-max announce-rounds announce-step throttle-trigger-threshold "
    "cpu-throttle-initial cpu-throttle-increment cpu-throttle-tailslow tls-creds tls-hostname tls-authz "
    "max-bandwidth avail-switchover-bandwidth downtime-limit x-checkpoint-delay multifd-channels "
    "xbzrle-cache-size max-postcopy-bandwidth max-cpu-throttle multifd-compression multifd-zlib-level "
    "multifd-qatzip-level multifd-zstd-level block-bitmap-mapping x-vcpu-dirty-limit-period vcpu-dirty-limit "
    "mode zero-page-detection direct-io"
)
_IN_TEXT_7_2 = (
    "announce-initial announce-max announce-rounds announce-step compress-level compress-threads "
    "compress-wait-thread decompress-threads throttle-trigger-threshold cpu-throttle-initial "
    "cpu-throttle-increment cpu-throttle-tailslow max-cpu-throttle tls-creds tls-hostname max-bandwidth "
    "downtime-limit x-checkpoint-delay block-incremental multifd-channels multifd-compression xbzrle-cache-size "
    "max-postcopy-bandwidth tls-authz block-bitmap-mapping"
)
_IN_TEXT_10_0 = (
    "announce-initial announce-max announce-rounds announce-step throttle-trigger-threshold "
    "cpu-throttle-initial cpu-throttle-increment cpu-throttle-tailslow max-cpu-throttle tls-creds tls-hostname "
    "max-bandwidth avail-switchover-bandwidth downtime-limit x-checkpoint-delay multifd-channels "
    "multifd-compression zero-page-detection xbzrle-cache-size max-postcopy-bandwidth tls-authz "
    "block-bitmap-mapping x-vcpu-dirty-limit-period vcpu-dirty-limit mode direct-io"
)
_STATUSES_7_2 = (
    "none setup cancelling cancelled active postcopy-active postcopy-paused postcopy-recover completed failed "
    "colo pre-switchover device wait-unplug"
)
_STATUSES_10_0 = (
    "none setup cancelling cancelled active postcopy-active postcopy-paused postcopy-recover-setup "
    "postcopy-recover completed failed colo pre-switchover device wait-unplug"
)
_PARAMETERS_11_1 = f"{_PARAMETERS_10_0} cpr-exec-command x-rdma-chunk-size"
_IN_TEXT_11_1 = (
    "announce-initial announce-max announce-rounds announce-step throttle-trigger-threshold "
    "cpu-throttle-initial cpu-throttle-increment cpu-throttle-tailslow max-cpu-throttle tls-creds tls-hostname "
    "tls-authz max-bandwidth avail-switchover-bandwidth max-postcopy-bandwidth downtime-limit x-checkpoint-delay "
    "multifd-channels multifd-compression zero-page-detection xbzrle-cache-size block-bitmap-mapping "
    "x-vcpu-dirty-limit-period vcpu-dirty-limit mode direct-io x-rdma-chunk-size cpr-exec-command"
)
_STATUSES_11_1 = (
    "none setup cancelling cancelled active postcopy-device postcopy-active postcopy-paused "
    "postcopy-recover-setup postcopy-recover completed failing failed colo pre-switchover device wait-unplug"
)
_KEEP_ALIVE = ("keep-alive-count", "keep-alive-idle", "keep-alive-interval")
_IGNORE_SHARED = ("postcopy-ram", "x-ignore-shared", "Postcopy is not compatible with ignore-shared")


def _globals(own: str) -> tuple[str, ...]:
    return (
        *("globals:", "store-global-state: on", "only-migratable: off", "send-configuration: on"),
        *("send-section-footer: on", own, "clear-bitmap-shift: 18"),
    )


_7_2 = Dialect(
    version=(7, 2, 22),
    capabilities=tuple(_CAPABILITIES_7_2.split()),
    deprecated_capabilities=(),
    conflicts=(_IGNORE_SHARED, ("compress", "multifd", "Multifd is not compatible with compress")),
    needs=(),
    parameters=tuple(_PARAMETERS_7_2.split()),
    subjects=("Parameter '{}'", ()),
    hyphens=False,
    ignored_parameters=frozenset({"multifd-zlib-level", "multifd-zstd-level"}),
    modes=(),
    null_parameters=False,
    preempt_before_incoming=False,
    statuses=tuple(_STATUSES_7_2.split()),
    device_status=False,
    postcopy_before_stop=True,
    setup_while_listening=False,
    precopy_passes_only=False,
    error_before_failed=False,
    downtime_in_postcopy=False,
    address_after_listening=True,
    skipped_pages=True,
    remaining=False,
    latency=False,
    blocktime_of_precopy=True,
    migrate_flags=("blk", "inc", "detach", "resume"),
    channels=False,
    exit_on_error=False,
    singlestep=True,
    globals=_globals("decompress-error-check: on"),
    grouped_info=False,
    parameter_is_rest=False,
    parameters_in_text=tuple(_IN_TEXT_7_2.split()),
    postcopy_bandwidth_unit="",
    pause_refusal="migrate-pause is currently only supported during postcopy-active state",
    file_addresses=False,
    empty_fd_name=True,
    fd_of_file=True,
    inet_options=(),
    keep_alive=(),
    unknown_address="Parameter 'uri' expects a valid migration protocol",
    switchover_start=False,
    preempt_first=True,
    loaded_ping=False,
)
_10_0 = Dialect(
    version=(10, 0, 2),
    capabilities=tuple(_CAPABILITIES_10_0.split()),
    deprecated_capabilities=("zero-blocks",),
    conflicts=(
        _IGNORE_SHARED,
        ("postcopy-ram", "multifd", "Postcopy is not yet compatible with multifd"),
        ("multifd", "xbzrle", "Multifd is not compatible with xbzrle"),
        ("mapped-ram", "xbzrle", "Mapped-ram migration is incompatible with xbzrle"),
        ("mapped-ram", "postcopy-ram", "Mapped-ram migration is incompatible with postcopy"),
        (
            "auto-converge",
            "dirty-limit",
            "dirty-limit conflicts with auto-converge either of then available currently",
        ),
    ),
    needs=(),
    parameters=tuple(_PARAMETERS_10_0.split()),
    subjects=(
        "Parameter '{}'",
        (("x-vcpu-dirty-limit-period", "Parameter 'x-vcpu-dirty-limit-period'"),),
    ),
    hyphens=False,
    ignored_parameters=frozenset(),
    modes=("normal", "cpr-reboot", "cpr-transfer"),
    null_parameters=False,
    preempt_before_incoming=True,
    statuses=tuple(_STATUSES_10_0.split()),
    device_status=True,
    postcopy_before_stop=False,
    setup_while_listening=True,
    precopy_passes_only=False,
    error_before_failed=True,
    downtime_in_postcopy=True,
    address_after_listening=False,
    skipped_pages=False,
    remaining=False,
    latency=False,
    blocktime_of_precopy=True,
    migrate_flags=("detach", "resume"),
    channels=True,
    exit_on_error=True,
    singlestep=False,
    globals=_globals("send-switchover-start: on"),
    grouped_info=False,
    parameter_is_rest=False,
    parameters_in_text=tuple(_IN_TEXT_10_0.split()),
    postcopy_bandwidth_unit="",
    pause_refusal="migrate-pause is currently only supported during postcopy-active or postcopy-recover state",
    file_addresses=True,
    empty_fd_name=False,
    fd_of_file=True,
    inet_options=(),
    keep_alive=(),
    unknown_address="unknown migration protocol: {uri}",
    switchover_start=True,
    preempt_first=False,
    loaded_ping=False,
)
_11_1 = replace(
    _10_0,
    version=(11, 1, 3),
    capabilities=tuple(name for name in _10_0.capabilities if name != "zero-blocks"),
    deprecated_capabilities=(),
    conflicts=tuple(row for row in _10_0.conflicts if row[:2] != ("postcopy-ram", "multifd")),
    needs=(("x-colo", "return-path", "Capability 'x-colo' requires capability 'return-path'"),),
    parameters=tuple(_PARAMETERS_11_1.split()),
    subjects=(
        "Option {}",
        (
            ("vcpu-dirty-limit", "Parameter 'vcpu-dirty-limit'"),
            ("x-rdma-chunk-size", "Option x_rdma_chunk_size"),
        ),
    ),
    hyphens=True,
    modes=(*_10_0.modes, "cpr-exec"),
    null_parameters=True,
    statuses=tuple(_STATUSES_11_1.split()),
    precopy_passes_only=True,
    remaining=True,
    latency=True,
    blocktime_of_precopy=False,
    migrate_flags=("resume",),
    globals=("Globals:", *(f"  {line}" for line in _10_0.globals[1:])),
    grouped_info=True,
    parameter_is_rest=True,
    parameters_in_text=tuple(_IN_TEXT_11_1.split()),
    postcopy_bandwidth_unit="bytes/second",
    fd_of_file=False,
    inet_options=("to", "ipv4", "ipv6", "keep-alive", *_KEEP_ALIVE, "mptcp", "numeric"),
    keep_alive=_KEEP_ALIVE,
    loaded_ping=True,
)
DIALECTS: dict[Compat, Dialect] = {"7.2": _7_2, "10.0": _10_0, "11.1": _11_1}
