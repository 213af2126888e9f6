"""Six kinds of failure, named after what the caller should do about them."""


class KvkeepError(Exception):
    """Base of every error kvkeep raises on purpose; its text is one sentence for a person."""


class InputError(KvkeepError):
    """The request or a setting is wrong: mend it. Nothing was changed. Exit code 2 or a 4xx."""


class RefusedError(KvkeepError):
    """The other side understood and will not: another version, layout, tenant or generation."""


class UnavailableError(KvkeepError):
    """The other side cannot answer now: treat as a miss and try again later."""


class CorruptDataError(KvkeepError):
    """Bytes are not what they should be: treat as absent, never use them."""


class CapacityError(KvkeepError):
    """There is no room: make room or wait."""


class InvariantError(KvkeepError):
    """kvkeep contradicts itself: stop this process, its memory can't be trusted."""
