"""A stranger's template can use up neither the server's time nor its memory, and reaches nothing but its variables."""

from __future__ import annotations

import os
import signal
import time

import pytest

from steerlm_nemo.errors import InputError
from steerlm_nemo.own_template import renderer
from steerlm_nemo.own_template.renderer import Renderer, TooLongError


def render(source, most=1000, **variables):
    made = Renderer(source)
    try:
        return made.render(variables, most)
    finally:
        made.close()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "having worked for 1 s"),
        ("{% set n = namespace(x='aa') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "more memory"),
        ("{{ '%1000000000000d' | format(1) }}", "more memory"),
        ("{{ many * 10**9 }}", "more memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    ],
)
def test_what_uses_up_time_or_memory_is_ended_and_the_next_request_served(monkeypatch, source, reason):
    monkeypatch.setattr(renderer, "SECONDS", 1)
    made = Renderer("{% if many %}" + source + "{% else %}fine{% endif %}")
    try:
        for _ in range(2):
            with pytest.raises(InputError, match=reason):
                made.render({"many": [1]}, 1000)
            assert made.render({}, 1000) == "fine"
    finally:
        made.close()


def test_no_more_text_is_made_than_asked_for():
    assert render("{% for a in range(9) %}abc{% endfor %}", most=27) == "abc" * 9
    started = time.monotonic()
    with pytest.raises(TooLongError, match="more than 26 characters"):
        render("{% for a in range(99999) %}{{ 'abc' * 9 }}{% endfor %}", most=26)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "source",
    [
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{{ raise_exception.__globals__['sys'].modules }}",
        "{{ messages.append('x') }}",
        "{% set _ = names.update(a=1) %}",
        "{{ '{0.__class__.__base__}'.format(names) }}",
    ],
)
def test_a_template_reaches_nothing_but_its_variables_and_changes_none(source):
    with pytest.raises(InputError, match="fails on this conversation: (SecurityError|TypeError: no loader)"):
        render(source, messages=["a"], names={})


def test_the_process_can_open_no_file_and_knows_no_token(monkeypatch):
    monkeypatch.setenv("STEERLM_TOKEN", "secret")
    made = Renderer("x")
    try:
        pid = made._process.pid
        with open(f"/proc/{pid}/environ", "rb") as file:
            assert b"secret" not in file.read()
        with open(f"/proc/{pid}/limits") as file:
            limits = {line[:26].strip(): line[26:].split()[:2] for line in file}
        assert limits["Max open files"] == ["0", "0"] and limits["Max core file size"] == ["0", "0"]
        assert limits["Max address space"][1] != "unlimited" and limits["Max cpu time"][0] != "unlimited"
        assert os.getsid(pid) == pid  # Ctrl-C at the server's terminal is not for it
    finally:
        made.close()


def test_a_process_that_was_killed_is_replaced():
    made = Renderer("{{ 1 + 1 }}")
    os.kill(made._process.pid, signal.SIGKILL)
    made._process.wait()
    assert made.render({}, 10) == "2"
    made.close()


def test_what_is_not_of_a_template_is_told_in_words():
    for source, reason in (
        ("a\n{% for %}", "cannot be used: line 2: Expected an expression"),
        ("{{ x.y }}", "UndefinedError: 'x' is undefined"),
        ("{{ raise_exception('Only users, please') }}", "refuses this conversation: Only users, please$"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ x }}", "surrogates not allowed"),
    ):
        with pytest.raises(InputError, match=reason):
            render(source, **({"x": "\ud800"} if source == "{{ x }}" else {}))


def test_what_transformers_adds_to_jinja_is_there():
    source = (
        "{%- for m in messages %}\n    {%- if m == 'b' %}{% continue %}{% endif %}\n    {% generation %}{{ m }}"
        "{% endgeneration %}\n{%- endfor %}{{ names | tojson }}{{ names | tojson(indent=1) }}{{ strftime_now('%%') }}"
    )
    assert render(source, messages=["a", "b", "c"], names={"<": "é"}) == 'ac{"<": "é"}{\n "<": "é"\n}%'
