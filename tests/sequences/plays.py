"""What can happen in a migration, played through two monitors.

Nothing depends on how fast a machine is: where a scenario acts in the middle, the link is slow by max-bandwidth
until it has acted, and looks are taken only where nothing moves.
"""

from __future__ import annotations

import socket

import trio

from tests.sequences.stage import Stage, deaf, listening, relayed

EVENTS = [{"capability": "events", "state": True}]

# --- to the end


async def precopy(stage: Stage) -> None:
    await stage.flowing()
    await stage.look()
    await stage.fast()
    await stage.ended()


async def precopy_with_return_path(stage: Stage) -> None:
    await stage.flowing("return-path")
    await stage.fast()
    await stage.ended()


async def stopped_and_continued(stage: Stage) -> None:
    """The source, while its memory goes over."""
    await stage.flowing()
    await stage.take("stop")
    await stage.look()
    await stage.take("cont")
    await stage.look()
    await stage.fast()
    await stage.ended()


async def stopped(stage: Stage) -> None:
    """The source, while its memory goes over."""
    await stage.flowing()
    await stage.take("stop")
    await stage.look()
    await stage.fast()
    await stage.ended()


async def postcopy_at_once(stage: Stage) -> None:
    await stage.start("postcopy-ram")
    await stage.switch()
    await stage.look()
    await stage.fast()
    await stage.ended()


async def postcopy_before_connected(stage: Stage) -> None:
    await stage.prepare("postcopy-ram")
    await stage.listen()
    with deaf(stage.folder, "unix") as (uri, listener):
        await stage.take("migrate", uri=uri)
        await stage.src.until_status("setup")
        await stage.take("migrate-start-postcopy")
        await stage.look()
        listener.accept()[0].close()
        async with relayed(listener, stage.path):
            await stage.switched()
            await stage.fast()
            await stage.ended()


async def postcopy_in_the_middle(stage: Stage) -> None:
    await stage.flowing("postcopy-ram")
    await stage.look()
    await stage.switch()
    await stage.look()
    await stage.take("migrate-start-postcopy")
    await stage.fast()
    await stage.ended()


async def postcopy_with_preempt(stage: Stage) -> None:
    await stage.flowing("postcopy-ram", "postcopy-preempt")
    await stage.look()
    await stage.switch()
    await stage.look()
    await stage.fast()
    await stage.ended()


async def recovered_with_preempt(stage: Stage) -> None:
    """Both connections are broken, and made again."""
    again = f"unix:{stage.folder}/again"
    await stage.flowing("postcopy-ram", "postcopy-preempt")
    await stage.switch()
    assert await stage.take("migrate-pause")
    await stage.ended()
    assert await stage.take("migrate-recover", stage.dst, uri=again)
    assert await stage.take("migrate", uri=again, resume=True)
    for node in (stage.src, stage.dst):
        await node.until_status("postcopy-active")
    await stage.more()
    await stage.fast()
    await stage.ended()


async def postcopy_after_the_end(stage: Stage) -> None:
    await stage.start("postcopy-ram")
    await stage.fast()
    await stage.ended()
    await stage.take("migrate-start-postcopy")
    await stage.look()


async def postcopy_not_possible(stage: Stage) -> None:
    """The capability is not set."""
    await stage.take("migrate-start-postcopy")
    await stage.take("migrate-start-postcopy", stage.dst)
    await stage.flowing()
    await stage.take("migrate-start-postcopy")
    await stage.fast()
    await stage.ended()


# --- cancelled


async def _cancel_in_setup(stage: Stage, family: str) -> None:
    await stage.prepare()
    with deaf(stage.folder, family) as (uri, _):
        await stage.take("migrate", uri=uri)
        await stage.src.until_status("setup")
        await stage.look()
        await stage.take("migrate_cancel")
        # 7.2 waits for the end of its attempt.
    await stage.ended(stage.src)


async def cancel_in_setup(stage: Stage) -> None:
    await _cancel_in_setup(stage, "unix")


async def cancel_in_setup_of_tcp(stage: Stage) -> None:
    await _cancel_in_setup(stage, "tcp")


async def cancel_active(stage: Stage) -> None:
    await stage.flowing()
    await stage.take("migrate_cancel")
    await stage.given_up()
    await stage.ended(stage.src)
    await stage.take("migrate_cancel")
    await stage.look()


async def cancel_active_with_postcopy_allowed(stage: Stage) -> None:
    await stage.flowing("postcopy-ram")
    await stage.take("migrate_cancel")
    await stage.given_up()
    await stage.ended(stage.src)


async def cancel_at_the_last_word(stage: Stage) -> None:
    """The destination has all; that it says so has not come. (10.0: status device.)"""
    await stage.prepare("return-path")
    await stage.listen()
    with listening(stage.folder / "between") as (uri, listener):
        async with relayed(listener, stage.path, back=(back := trio.Event())):
            await stage.take("migrate", uri=uri)
            await stage.moving()
            await stage.fast()
            await stage.ended(stage.dst)
            if not await stage.take("migrate_cancel"):
                back.set()
            await stage.ended(stage.src)


async def last_word_awaited(stage: Stage) -> None:
    """As :func:`cancel_at_the_last_word`, but for the cancel."""
    await stage.prepare("return-path")
    await stage.listen()
    with listening(stage.folder / "between") as (uri, listener):
        async with relayed(listener, stage.path, back=(back := trio.Event())):
            await stage.take("migrate", uri=uri)
            await stage.moving()
            await stage.fast()
            await stage.ended(stage.dst)
            back.set()
            await stage.ended(stage.src)


async def cancel_in_postcopy(stage: Stage) -> None:
    await stage.flowing("postcopy-ram")
    await stage.switch()
    if not await stage.take("migrate_cancel"):
        await stage.fast()
    await stage.ended()


async def cancel_nothing(stage: Stage) -> None:
    for node in (stage.src, stage.dst):
        await stage.take("migrate_cancel", node)
    await stage.look()
    await stage.flowing()
    await stage.take("migrate_cancel", stage.dst)
    await stage.look()
    await stage.fast()
    await stage.ended()
    for node in (stage.src, stage.dst):
        await stage.take("migrate_cancel", node)
    await stage.look()


# --- failed


async def _nobody_listens(stage: Stage, uri: str) -> None:
    await stage.prepare()
    await stage.take("migrate", uri=uri)
    await stage.ended(stage.src)
    await stage.take("migrate_cancel")
    await stage.look()


async def nobody_listens(stage: Stage) -> None:
    (stage.folder / "none").touch()
    await _nobody_listens(stage, f"unix:{stage.folder}/none")


async def no_socket_there(stage: Stage) -> None:
    await _nobody_listens(stage, f"unix:{stage.folder}/none")


async def nobody_listens_at_tcp(stage: Stage) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        await _nobody_listens(stage, f"tcp:127.0.0.1:{closed.getsockname()[1]}")


async def destination_dies(stage: Stage) -> None:
    await stage.flowing()
    await stage.kill(stage.dst)
    await stage.ended(stage.src)


async def destination_dies_with_return_path(stage: Stage) -> None:
    await stage.flowing("return-path")
    await stage.kill(stage.dst)
    await stage.ended(stage.src)


async def destination_dies_in_postcopy(stage: Stage) -> None:
    await stage.flowing("postcopy-ram")
    await stage.switch()
    await stage.kill(stage.dst)
    await stage.ended(stage.src)
    for name in ("cont", "stop", "migrate-start-postcopy"):
        await stage.take(name)
    await stage.take("migrate", uri=stage.uri)
    await stage.take("migrate-set-capabilities", capabilities=EVENTS)
    await stage.look()


async def cancel_paused_postcopy(stage: Stage) -> None:
    await stage.flowing("postcopy-ram")
    await stage.switch()
    await stage.kill(stage.dst)
    await stage.ended(stage.src)
    await stage.take("migrate_cancel")
    await stage.look()


async def source_dies(stage: Stage) -> None:
    await stage.flowing()
    await stage.kill(stage.src)
    await stage.given_up()


async def source_dies_in_postcopy(stage: Stage) -> None:
    await stage.flowing("postcopy-ram")
    await stage.switch()
    await stage.kill(stage.src)
    await stage.ended(stage.dst)


async def another_size(stage: Stage) -> None:
    """The destination was started with less memory."""
    await stage.start()
    await stage.given_up()
    await stage.ended(stage.src)


async def another_size_with_return_path(stage: Stage) -> None:
    await stage.start("return-path")
    await stage.given_up()
    await stage.ended(stage.src)


async def another_size_outlived(stage: Stage) -> None:
    """The destination was told not to exit."""
    await stage.prepare()
    await stage.take("migrate-incoming", stage.dst, uri=stage.uri, exit_on_error=False)
    await stage.take("migrate", uri=stage.uri)
    await stage.ended()
    await stage.take("migrate-incoming", stage.dst, uri=stage.uri)
    await stage.take("migrate_cancel", stage.dst)
    await stage.look()


# --- paused and recovered


async def recovered(stage: Stage) -> None:
    """A person breaks the link, and recovers it; each command is tried where it has no place, too."""
    again = f"unix:{stage.folder}/again"
    await stage.flowing("postcopy-ram")
    for node in (stage.src, stage.dst):
        await stage.take("migrate-pause", node)
        await stage.take("migrate-recover", node, uri=again)
    await stage.take("migrate", uri=again, resume=True)
    await stage.switch()
    for node in (stage.src, stage.dst):
        await stage.take("migrate-recover", node, uri=again)
    assert await stage.take("migrate-pause")
    await stage.ended()
    for node in (stage.src, stage.dst):
        await stage.take("migrate-pause", node)
        await stage.take("migrate-start-postcopy", node)
    await stage.take("migrate-recover", uri=again)
    await stage.take("migrate", uri=again)
    assert await stage.take("migrate-recover", stage.dst, uri=again)
    assert await stage.take("migrate", uri=again, resume=True)
    for node in (stage.src, stage.dst):
        await node.until_status("postcopy-active")
    await stage.more()
    await stage.look()
    await stage.fast()
    await stage.ended()
    for node in (stage.src, stage.dst):
        await stage.take("migrate-pause", node)


async def recovered_at_the_second_attempt(stage: Stage) -> None:
    """The first finds nobody."""
    again = f"unix:{stage.folder}/again"
    await stage.flowing("postcopy-ram")
    await stage.switch()
    assert await stage.take("migrate-pause")
    await stage.ended()
    assert await stage.take("migrate", uri=again, resume=True)
    while (await stage.src.statuses())[1]["status"] != "postcopy-paused":
        await trio.sleep(0.01)
    await stage.look()
    assert await stage.take("migrate-recover", stage.dst, uri=again)
    assert await stage.take("migrate", uri=again, resume=True)
    for node in (stage.src, stage.dst):
        await node.until_status("postcopy-active")
    await stage.fast()
    await stage.ended()


# --- one after the other


async def second_migrate(stage: Stage) -> None:
    await stage.flowing()
    for node in (stage.src, stage.dst):
        await stage.take("migrate", node, uri=stage.uri)
        await stage.take("migrate-set-capabilities", node, capabilities=EVENTS)
    await stage.take("migrate-incoming", stage.dst, uri=stage.uri)
    await stage.look()
    await stage.fast()
    await stage.ended()


async def again_after_failure(stage: Stage) -> None:
    await stage.prepare()
    await stage.take("migrate", uri=f"unix:{stage.folder}/none")
    await stage.ended(stage.src)
    await stage.listen()
    await stage.take("migrate", uri=stage.uri)
    await stage.moving()
    await stage.look()
    await stage.fast()
    await stage.ended()


async def again_after_cancel(stage: Stage) -> None:
    """It was cancelled while it was sent to a peer that reads nothing."""
    await stage.prepare("postcopy-ram")
    with listening(stage.folder / "mute") as (uri, _):
        await stage.take("migrate", uri=uri)
        await stage.src.until_status("active")
        await stage.take("migrate_cancel")
        await stage.ended(stage.src)
    await stage.listen()
    await stage.take("migrate", uri=stage.uri)
    await stage.moving()
    await stage.switch()
    await stage.fast()
    await stage.ended()


async def after_completion(stage: Stage) -> None:
    await stage.start()
    await stage.fast()
    await stage.ended()
    await stage.take("migrate", uri=stage.uri)
    await stage.take("migrate-incoming", stage.dst, uri=stage.uri)
    await stage.look()


async def continued_after_completion(stage: Stage) -> None:
    """QEMU lets the left machine run again."""
    await stage.start()
    await stage.fast()
    await stage.ended()
    await stage.take("cont")
    await stage.look()


async def waiting(stage: Stage) -> None:
    """Commands at a destination that waits, before and after migrate-incoming, and while memory comes."""
    dst = stage.dst
    await stage.look()
    await stage.take("migrate", dst, uri=stage.uri)
    await stage.take("stop", dst)
    await stage.take("migrate-start-postcopy", dst)
    await stage.prepare()
    await stage.listen()
    await stage.look()
    await stage.take("migrate-incoming", dst, uri=stage.uri)
    await stage.take("migrate", dst, uri=stage.uri)
    await stage.take("migrate_cancel", dst)
    await stage.look()
    await stage.take("migrate", uri=stage.uri)
    await stage.moving()
    await stage.take("stop", dst)
    await stage.look()
    await stage.fast()
    await stage.ended()


async def cont_at_one_that_waits(stage: Stage) -> None:
    """A machine of QEMU's runs then when it has come, also if QEMU was started with -S."""
    await stage.take("cont", stage.dst)
    await stage.look()
    await stage.flowing()
    await stage.take("cont", stage.dst)
    await stage.look()
    await stage.fast()
    await stage.ended()
    await stage.take("cont", stage.dst)
    await stage.look()
