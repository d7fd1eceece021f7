"""Events of an endpoint, told to a listener whose failures change nothing of a migration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vhostpc.errors import is_foreseen, sentence
from vhostpc.logs import rationed_logger
from vhostpc.migration.status import Status

log = rationed_logger(__name__)


class Unfailing:
    """Tells ``listener``, a :class:`vhostpc.endpoint.Listener`; what goes wrong in it is a line in the log.

    Raised while a machine is started it would count as a failure of the start, and the machine would run at both ends.
    """

    def __init__(self, listener: Any) -> None:
        self._listener = listener

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        self._tell(self._listener.emit, name, data)

    def migration(self, status: Status) -> None:
        self._tell(self._listener.migration, status)

    def migration_pass(self, number: int) -> None:
        self._tell(self._listener.migration_pass, number)

    def stop(self) -> None:
        self._tell(self._listener.stop)

    def resume(self) -> None:
        self._tell(self._listener.resume)

    @staticmethod
    def _tell(method: Callable[..., None], *arguments: object) -> None:
        try:
            method(*arguments)
        except Exception as error:
            log.error(
                "an event cannot be told: %s", sentence(error), exc_info=None if is_foreseen(error) else error
            )
