"""Bytes and values, without I/O: vhost-user's messages, QEMU's migration stream and its return path."""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.wire import vhost_user
    from vhostpc.wire.migration.elements import (
        BadStream,
        BitmapRequest,
        BlockInfo,
        Command,
        Configuration,
        DeviceSection,
        EnableColo,
        EndOfStream,
        Footer,
        Header,
        OpenReturnPath,
        Package,
        Ping,
        PostcopyAdvise,
        PostcopyListen,
        PostcopyResume,
        PostcopyRun,
        RamBlocks,
        RamData,
        RamDiscard,
        RamFlush,
        RamRun,
        RunKind,
        SectionEnd,
        SectionPart,
        SectionStart,
        StreamEvent,
        SwitchoverStart,
        VmDescription,
    )
    from vhostpc.wire.migration.ramrec import (
        BadRamStream,
        BadRecord,
        EndOfSection,
        RamDecoder,
        RamEncoder,
        RamFlag,
        RamPage,
    )
    from vhostpc.wire.migration.return_path import (
        PageRequest,
        Pong,
        ReceivedBitmap,
        ResumeAck,
        ReturnPathDecoder,
        ReturnPathMessage,
        Shut,
        SwitchoverAck,
    )
    from vhostpc.wire.migration.split import Inside, read_package
    from vhostpc.wire.migration.stream import RamMode, StreamReader
    from vhostpc.wire.vhost_user import (
        BackendRequest,
        ConfigSpace,
        Feature,
        Frame,
        FrameReader,
        Inflight,
        LogArea,
        MemoryRegion,
        ProtocolFeature,
        Reply,
        Request,
        VringAddr,
        VringState,
    )

__all__ = [
    "BackendRequest",
    "BadRamStream",
    "BadRecord",
    "BadStream",
    "BitmapRequest",
    "BlockInfo",
    "Command",
    "ConfigSpace",
    "Configuration",
    "DeviceSection",
    "EnableColo",
    "EndOfSection",
    "EndOfStream",
    "Feature",
    "Footer",
    "Frame",
    "FrameReader",
    "Header",
    "Inflight",
    "Inside",
    "LogArea",
    "MemoryRegion",
    "OpenReturnPath",
    "Package",
    "PageRequest",
    "Ping",
    "Pong",
    "PostcopyAdvise",
    "PostcopyListen",
    "PostcopyResume",
    "PostcopyRun",
    "ProtocolFeature",
    "RamBlocks",
    "RamData",
    "RamDecoder",
    "RamDiscard",
    "RamEncoder",
    "RamFlag",
    "RamFlush",
    "RamMode",
    "RamPage",
    "RamRun",
    "ReceivedBitmap",
    "Reply",
    "Request",
    "ResumeAck",
    "ReturnPathDecoder",
    "ReturnPathMessage",
    "RunKind",
    "SectionEnd",
    "SectionPart",
    "SectionStart",
    "Shut",
    "StreamEvent",
    "StreamReader",
    "SwitchoverAck",
    "SwitchoverStart",
    "VmDescription",
    "VringAddr",
    "VringState",
    "read_package",
    "vhost_user",
]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__,
        {
            "vhostpc.wire.migration.elements": (
                "BadStream BitmapRequest BlockInfo Command Configuration DeviceSection EnableColo "
                "EndOfStream Footer Header OpenReturnPath Package Ping PostcopyAdvise PostcopyListen "
                "PostcopyResume PostcopyRun RamBlocks RamData RamDiscard RamFlush RamRun RunKind "
                "SectionEnd SectionPart SectionStart StreamEvent SwitchoverStart VmDescription"
            ),
            "vhostpc.wire.migration.ramrec": (
                "BadRamStream BadRecord EndOfSection RamDecoder RamEncoder RamFlag RamPage"
            ),
            "vhostpc.wire.migration.return_path": (
                "PageRequest Pong ReceivedBitmap ResumeAck ReturnPathDecoder ReturnPathMessage Shut "
                "SwitchoverAck"
            ),
            "vhostpc.wire.migration.split": "Inside read_package",
            "vhostpc.wire.migration.stream": "RamMode StreamReader",
            "vhostpc.wire.vhost_user": (
                "vhost_user BackendRequest ConfigSpace Feature Frame FrameReader Inflight LogArea "
                "MemoryRegion ProtocolFeature Reply Request VringAddr VringState"
            ),
        },
    )
