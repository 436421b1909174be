"""What a run of preprocessing, or a look at data, is asked for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from steerlm_nemo.attributes import Attributes, AttributeSchema
from steerlm_nemo.conversation import ASSISTANT, RECORD_TYPES, USER, RecordType
from steerlm_nemo.errors import InputError
from steerlm_nemo.records import lone_surrogate


@dataclass(frozen=True)
class Filters:
    """What to leave out on request. The reference keeps everything: a value model should see poor data too."""

    languages: tuple[str, ...] = ()  # empty: all
    tree_states: tuple[str, ...] = ()  # empty: all
    drop_deleted: bool = False


@dataclass(frozen=True)
class Options:
    """How records are made. What a source says of its conversations goes before what is asked for here."""

    mask_role: str = USER
    record_type: RecordType = RECORD_TYPES[0]
    schema: AttributeSchema | None = None  # attributes to keep; None: the format's own
    filters: Filters = field(default_factory=Filters)
    compat: bool = False  # the reference's bytes where they are not what a user would want
    system: str | None = None  # None: the format's own
    fill: Attributes = field(default_factory=lambda: Attributes(()))  # for responses whose attributes lack these

    def check(self) -> None:
        """Raise InputError for a type or a speaker that no record can have."""
        if self.record_type not in RECORD_TYPES:
            raise InputError(f"--type is {self.record_type!r}; it must be {' or '.join(RECORD_TYPES)}")
        for role in self.mask_role.split(","):
            if role.strip() not in (USER, ASSISTANT):
                near = difflib.get_close_matches(role.strip().capitalize(), (USER, ASSISTANT), n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InputError(
                    f"--mask_role is {self.mask_role!r}, but the speakers are {USER} and {ASSISTANT}{hint} With any "
                    "other, data_clean would leave out every record"
                )
        if problem := lone_surrogate(self.system):
            raise InputError(f"--system: {problem}; the terminal and the text have different encodings")
