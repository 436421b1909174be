"""One turn's attribute line, asked of a value model.

The reference asks one token at a time: `quality:` -> `4`, `quality:4,toxicity:` -> `0`, ... thirteen requests a
turn. A greedy model that writes the whole line with every key in its place has answered the same questions: each
value is its most likely token after the same text. So one request is enough. Our server walks the line with its keys
forced and its values chosen among the legal ones (POST /v1/attribute_lines), and tells how sure it was. From another
server the line is generated freely; from the first item that does not come out legal, the rest is asked slot by slot.

Values that are known already (a person's) are given: they stand in the line, and later values are chosen after them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerlm_nemo.attributes import Attributes, AttributeSchema
from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.errors import InputError, ServerError
from steerlm_nemo.model_kind import SteerLMFormat

GREEDY = {"greedy": True, "temperature": 0.1, "top_k": 1, "top_p": 1.0, "repetition_penalty": 1.0, "add_BOS": False}


@dataclass
class Line:
    """The items found so far for one prompt, and how they were found."""

    prompt: str
    given: dict[str, str]
    items: list[tuple[str, str]] = field(default_factory=list)
    num_slots: int = 0  # values asked alone
    num_chosen: int = 0  # of those: the model's first choice was illegal, the likeliest legal value was taken

    @property
    def text(self) -> str:
        return ",".join(f"{key}:{value}" for key, value in self.items)

    def before_value(self, key: str) -> str:
        """The prompt up to and including `key:`."""
        return self.prompt + ",".join([f"{k}:{v}" for k, v in self.items] + [f"{key}:"])


@dataclass(frozen=True)
class GradedLine:
    """A full, legal line; how sure the model is of each chosen value (None: not asked, or not told); and counts of
    `by_line`, `by_slots`, `slots`, `chosen` and `given`."""

    attributes: Attributes
    beliefs: dict[str, dict[str, Any]] | None
    counts: Counter[str]


class Grader:
    """Asks for attribute lines. `mode` is "line" or "slots"; both give the same greedy values."""

    def __init__(self, servers: ServerPool, served: SteerLMFormat, mode: str, *, beliefs: bool = True) -> None:
        self._servers = servers
        self._schema = served.schema
        self._keys = served.schema.keys()
        self._end = served.template.end_of_name
        self._stops = [served.template.turn_start, served.template.end_of_name]
        self._mode = mode
        self._beliefs = beliefs
        self._longest_line = len(self._longest().encode()) + 1

    def grade(
        self, prompts: Sequence[str], given: Sequence[Mapping[str, int | str]] | None = None, home: int = 0
    ) -> list[GradedLine]:
        """One line per prompt. `given`: legal values that are known of each line. `home`: see `ServerPool`.

        Raises:
            ServerError: see `ServerPool.generate`.
        """
        known = [{key: str(value) for key, value in row.items()} for row in given or [{}] * len(prompts)]
        found = None
        if self._mode == "line":
            found = self._servers.attribute_lines(prompts, known, home, beliefs=self._beliefs)
        if found is not None:
            return [
                GradedLine(
                    self._legal(line.text, values),
                    line.beliefs,
                    Counter({"by_line": 1, "chosen": line.num_overruled, "given": len(values)}),
                )
                for line, values in zip(found, known, strict=True)
            ]
        lines = [Line(prompt, values) for prompt, values in zip(prompts, known, strict=True)]
        if self._mode == "line":
            self._ask_whole([line for line in lines if not line.given], home)
        for key in self._keys:
            unread = [line for line in lines if key not in dict(line.items)]
            for line in unread:
                if key in line.given:
                    line.items.append((key, line.given[key]))
            self._ask_slot([line for line in unread if key not in line.given], key, home)
        return [GradedLine(Attributes.parse(line.text), None, self._counts(line)) for line in lines]

    def _legal(self, line: str, given: Mapping[str, str]) -> Attributes:
        where = self._servers.where
        try:
            attributes = Attributes.parse(line)
            self._schema.check(attributes)
        except (ValueError, InputError) as err:
            raise ServerError(f"{where} answered {line!r}, which is no attribute line: {err}") from err
        values = attributes.as_dict()
        if tuple(values) != self._keys:
            raise ServerError(f"{where} answered {line!r}; its attributes must be {', '.join(self._keys)}")
        if changed := [key for key, value in given.items() if str(values[key]) != value]:
            raise ServerError(f"{where} answered {line!r}, though {changed[0]}:{given[changed[0]]} was given")
        return attributes

    def _ask_whole(self, lines: Sequence[Line], home: int) -> None:
        if not lines:
            return
        generation = self._servers.generate(
            [line.prompt for line in lines],
            home,
            tokens_to_generate=self._longest_line,  # a token is at least one byte
            min_tokens_to_generate=1,
            end_strings=self._stops,
            **GREEDY,
        )
        for line, completion in zip(lines, generation.completions, strict=True):
            line.items = legal_prefix(completion, self._schema, self._end)

    def _ask_slot(self, lines: Sequence[Line], key: str, home: int) -> None:
        if not lines:
            return
        legal = self._schema.legal_values(key)
        values: list[str] = [""] * len(lines)
        # One token cannot tell 1 from the beginning of 10.
        if not any(a != b and b.startswith(a) for a in legal for b in legal):
            generation = self._servers.generate(
                [line.before_value(key) for line in lines],
                home,
                tokens_to_generate=1,
                min_tokens_to_generate=1,
                end_strings=self._stops,
                **GREEDY,
            )
            values = [completion.strip() for completion in generation.completions]
        for line, value in zip(lines, values, strict=True):
            line.num_slots += 1
            if value not in legal:
                value = self._likeliest(line.before_value(key), key, legal, home)
                line.num_chosen += 1
            line.items.append((key, value))

    def _likeliest(self, prompt: str, key: str, legal: Sequence[str], home: int) -> str:
        """The legal value with the highest probability after `prompt`, its closing separator included.

        The separator makes values comparable of which one begins another (1 and 10). Each candidate is sent as a
        prompt and its own log-probabilities are read, which needs no answer over the whole vocabulary.
        """
        after = self._end if key == self._keys[-1] else ","
        generation = self._servers.generate(
            [prompt + value + after for value in legal],
            home,
            tokens_to_generate=1,
            min_tokens_to_generate=0,
            compute_logprob=True,
            end_strings=self._stops,
            **GREEDY,
        )
        rows = [row[:-1] for row in generation.token_ids]  # without the one generated token
        shared = 0
        while all(len(row) > shared for row in rows) and len({row[shared] for row in rows}) == 1:
            shared += 1
        assert generation.logprob is not None  # asked for above
        scores = [
            sum(logprob[max(shared, 1) - 1 : len(row) - 1])
            for row, logprob in zip(rows, generation.logprob, strict=True)
        ]
        return legal[scores.index(max(scores))]

    def _counts(self, line: Line) -> Counter[str]:
        found_by = "by_slots" if line.num_slots else "by_line"
        return Counter({found_by: 1, "slots": line.num_slots, "chosen": line.num_chosen, "given": len(line.given)})

    def _longest(self) -> str:
        return ",".join(f"{key}:{max(self._schema.legal_values(key), key=len)}" for key in self._keys)


def legal_prefix(completion: str, schema: AttributeSchema, end: str) -> list[tuple[str, str]]:
    """The items a completion begins with that are what slot-by-slot asking would have found.

    An item counts if its key is the schema's next and its value is legal and closed: by a comma, or by `end` after
    the last. (An item cut off by a limit may be the beginning of another value.)
    """
    items: list[tuple[str, str]] = []
    rest = completion
    keys = schema.keys()
    for key in keys:
        closing = end if key == keys[-1] else ","
        value, closed, after = rest.removeprefix(f"{key}:").partition(closing)
        if not rest.startswith(f"{key}:") or not closed or value not in schema.legal_values(key):
            break
        items.append((key, value))
        rest = after
    return items
