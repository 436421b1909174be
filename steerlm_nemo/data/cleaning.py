"""Training records that the trainer can learn from (reference: NeMo `data_clean.py`, v1.22 to v2.4).

Training sees the first `seq_len` tokens of a conversation, so a record whose targets all lie beyond them gives a
loss of 0/0. Such records are left out here, each with its reason; nothing else is changed unless trimming is asked
for.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from steerlm_nemo.conversation import Conversation, RecordRef, require_every_loss, to_lines
from steerlm_nemo.data.sources.helpsteer import refuse_strengths
from steerlm_nemo.errors import IncompleteError, RecordError
from steerlm_nemo.outputs import require_writable
from steerlm_nemo.record_report import SUFFIX, schema_facts, told_schema
from steerlm_nemo.records import (
    Accounting,
    RawLine,
    atomic_output,
    parse_line,
    read_raw_lines,
    require_other_file,
)
from steerlm_nemo.template import ChatTemplate, Rendered, Tokenizer, cut, num_seen
from steerlm_nemo.workers import in_order

# Why a readable record is left out. The first two are exceptions in the reference, the third is its `removed`.
NO_MASK_ROLE = "no turn is by the mask role"
NO_TARGET = "no target: every token is masked"
TARGET_BEYOND = "no target within seq_len"


@dataclass(frozen=True)
class Cleaner:
    """Decides about one record: what to write, or why not."""

    template: ChatTemplate
    tokenizer: Tokenizer
    seq_len: int
    trim_turns: bool = False

    def outcome(self, raw_line: tuple[RecordRef, bytes]) -> Outcome:
        """What becomes of a line as it stands in the file. Raises InputError: no line of the file is to be learnt."""
        line = parse_line(*raw_line)
        findings = Findings()
        try:
            return Outcome(line.ref, self.clean(line, findings), None, findings)
        except Dropped as dropped:
            return Outcome(line.ref, None, str(dropped), findings)
        except RecordError as err:
            refuse_strengths(line.record or {}, line.ref.path)
            kind = "not a conversation: " if line.problem is None else ""
            return Outcome(line.ref, None, kind + err.reason, findings, line.raw)

    def clean(self, line: RawLine, findings: Findings) -> str:
        """The line to write.

        Raises:
            Dropped: training could not learn from it; the message is the reason.
            RecordError: it is not a conversation.
        """
        conversation = Conversation.from_record(line.require_record(), line.ref)
        require_every_loss(conversation)
        rendered = self.template.render(conversation, self.tokenizer)
        speakers = {turn.role for turn in conversation.turns}
        if not speakers.issuperset(conversation.mask_roles):
            raise Dropped(NO_MASK_ROLE)
        if rendered.first_target is None:
            raise Dropped(NO_TARGET)
        if not self._has_target(rendered):
            raise Dropped(TARGET_BEYOND)
        num_turns = len(conversation.turns)
        if len(rendered.token_ids) > num_seen(self.seq_len):
            num_whole = self._num_whole_turns(conversation)
            findings.counts["records longer than seq_len"] += 1
            findings.counts["turns not whole within seq_len"] += num_turns - num_whole
            if self.trim_turns:
                conversation, rendered = self._trim(conversation, num_whole)
                findings.counts["turns trimmed"] += num_turns - len(conversation.turns)
        (text,) = to_lines([conversation])
        if rendered.num_markers_removed:
            findings.counts["records with marker texts in their content"] += 1
            findings.counts["marker texts that training will leave out"] += rendered.num_markers_removed
        findings.num_tokens += len(rendered.token_ids)
        return text

    def _has_target(self, rendered: Rendered) -> bool:
        return cut(rendered, self.seq_len).first_target is not None

    def _num_whole_turns(self, conversation: Conversation) -> int:
        """The most leading turns whose rendering is not cut."""

        def num_tokens(num_turns: int) -> int:
            return len(self._first(conversation, num_turns)[1].token_ids)

        return bisect_right(range(1, len(conversation.turns) + 1), num_seen(self.seq_len), key=num_tokens)

    def _trim(self, conversation: Conversation, num_whole: int) -> tuple[Conversation, Rendered]:
        """The whole turns; and, where they hold no target, the turns up to the first target within seq_len."""
        for num_turns in range(max(num_whole, 1), len(conversation.turns)):
            trimmed, rendered = self._first(conversation, num_turns)
            if self._has_target(rendered):
                return trimmed, rendered
        return conversation, self.template.render(conversation, self.tokenizer)

    def _first(self, conversation: Conversation, num_turns: int) -> tuple[Conversation, Rendered]:
        first = replace(conversation, turns=conversation.turns[:num_turns])
        return first, self.template.render(first, self.tokenizer)


class Dropped(Exception):
    """A sound record that training could not learn from; the message is one of the reasons above."""


@dataclass
class Findings:
    """What was seen in the records that were kept."""

    num_tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Findings) -> Findings:
        self.num_tokens += other.num_tokens
        if other.counts:
            self.counts.update(other.counts)
        return self

    def summary(self) -> str:
        lines = [f"tokens in kept records: {self.num_tokens}"]
        return "\n".join(lines + [f"{what}: {count}" for what, count in self.counts.items()])


@dataclass(frozen=True)
class Outcome:
    """The text to write, or the reason why there is none; `rejected` is an unusable line as it stands in the file."""

    ref: RecordRef
    text: str | None
    reason: str | None
    findings: Findings
    rejected: bytes | None = None


def clean_file(
    dataset_file: str | Path,
    output_file: str | Path,
    cleaner: Cleaner,
    records: Accounting,
    report: str | Path | None = None,
    on_record: Callable[[int, str | None], None] = lambda index, reason: None,
    num_workers: int = 1,
) -> Findings:
    """Write the records of `dataset_file` that training can learn from, in their order.

    Args:
        records: counts each record as written, filtered (with the reason) or rejected.
        report: a second JSON file for counts and reasons, which always stand beside the output; written even if nothing
            is left, but not over the report of an output that stays.
        on_record: called with each record's index and, where it is not written, why.
        num_workers: processes that do the work; nothing else depends on it.

    Raises:
        InputError: an unusable file.
        IncompleteError: no record is left; then there is no output file.
        RecordError: an unusable record in strict mode.
    """
    from tqdm import tqdm

    if report is not None:
        require_writable(report)
    require_other_file(output_file, dataset_file)
    facts = {
        "dataset_file": str(dataset_file),
        "output_file": str(output_file),
        "seq_len": cleaner.seq_len,
        "trim_turns": cleaner.trim_turns,
        "template": asdict(cleaner.template),
        **schema_facts(told_schema(dataset_file)),
    }
    findings = Findings()
    with records, atomic_output(output_file) as output:
        outcomes = in_order(cleaner.outcome, read_raw_lines(dataset_file), num_workers)
        for index, outcome in enumerate(tqdm(outcomes, desc="Cleaning", unit=" records", file=sys.stderr)):
            if outcome.text is not None:
                output.write(outcome.text + "\n")
                records.written()
            elif outcome.rejected is None:
                records.filtered(outcome.ref, str(outcome.reason))
            else:
                records.rejected(outcome.ref, str(outcome.reason), outcome.rejected)
            findings += outcome.findings
            on_record(index, outcome.reason)
        if records.counts["written"] or not records.earlier_outputs:
            for path in dict.fromkeys([f"{output_file}{SUFFIX}", *([str(report)] if report is not None else [])]):
                records.save(path, **facts, tokens=findings.num_tokens, findings=dict(findings.counts))
        if not records.counts["written"]:
            raise IncompleteError(
                f"{dataset_file}: nothing is left to train on at seq_len {cleaner.seq_len}: {records.summary()}"
                + (
                    ". Check the mask role, the labels and --seq_len."
                    if records.counts["filtered"]
                    else ""
                    if records.counts["rejected"]
                    else ". The file is empty."
                )
            )
    return findings
