import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steerlm_nemo.errors import InputError
from steerlm_nemo.pipeline.runner import PORT, Flow, Stage, StageError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

# Serves GET /health on its port after a moment, and says so when it has left in order.
SERVER = """
import http.server, pathlib, signal, sys, time
def leave(*_): raise SystemExit
signal.signal(signal.SIGINT, leave)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
time.sleep(0.3)
try:
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
finally:
    pathlib.Path(sys.argv[2]).write_text("left")
"""


def python(code, *argv):
    return [sys.executable, "-c", code, *map(str, argv)]


def writes(path, text="x", count_in=None):
    """A command that writes a file, and notes every run in another."""
    code = "import sys; open(sys.argv[1], 'w').write(sys.argv[2]); open(sys.argv[3], 'a').write('run\\n')"
    return python(code, path, text, count_in or f"{path}.runs")


def num_runs(path):
    return Path(path).read_text().count("run")


@pytest.fixture
def world(tmp_path):
    """A flow's folder with one input file; returns (run, paths)."""
    source, out = tmp_path / "source.txt", tmp_path / "out"
    source.write_text("one")
    out.mkdir()
    return source, out


def run(out, *stages):
    shown = io.StringIO()
    flow = Flow(out, shown)
    for stage in stages:
        flow.run(stage)
    return flow, shown.getvalue()


def two_stages(source, out, tmp_path, text="a"):
    first, second = out / "first" / "result", out / "second" / "result"
    copy = "import sys; open(sys.argv[2], 'w').write(open(sys.argv[1]).read().upper());"
    copy += "open(sys.argv[3], 'a').write('run\\n')"
    return (
        Stage("first", first.parent, [writes(first, text, tmp_path / "runs1")], [source], [first]),
        Stage("second", second.parent, [python(copy, first, second, tmp_path / "runs2")], [first], [second]),
    )


def test_a_second_run_does_nothing_and_remembers_the_times(world, tmp_path):
    source, out = world
    before, _ = run(out, *two_stages(source, out, tmp_path))
    after, shown = run(out, *two_stages(source, out, tmp_path))
    assert (num_runs(tmp_path / "runs1"), num_runs(tmp_path / "runs2")) == (1, 1)
    assert list(after.seconds) == ["first", "second"] and after.seconds == before.seconds
    assert "[first] done before" in shown
    assert (out / "second" / "result").read_text() == "A"


def test_a_changed_input_redoes_its_stage_but_not_the_next_if_the_result_is_the_same(world, tmp_path):
    source, out = world
    run(out, *two_stages(source, out, tmp_path))
    source.write_text("two")
    run(out, *two_stages(source, out, tmp_path))
    assert (num_runs(tmp_path / "runs1"), num_runs(tmp_path / "runs2")) == (2, 1)


def test_a_changed_parameter_redoes_its_stage_and_all_that_reads_its_result(world, tmp_path):
    source, out = world
    run(out, *two_stages(source, out, tmp_path))
    run(out, *two_stages(source, out, tmp_path, text="b"))
    assert (num_runs(tmp_path / "runs1"), num_runs(tmp_path / "runs2")) == (2, 2)
    assert (out / "second" / "result").read_text() == "B"


def test_a_lost_output_is_made_again(world, tmp_path):
    source, out = world
    run(out, *two_stages(source, out, tmp_path))
    (out / "first" / "result").unlink()
    run(out, *two_stages(source, out, tmp_path))
    assert (num_runs(tmp_path / "runs1"), num_runs(tmp_path / "runs2")) == (2, 1)


HALTING = """
import pathlib, sys
progress, result = map(pathlib.Path, sys.argv[1:3])
steps = int(progress.read_text()) if progress.exists() else 0
progress.write_text(str(steps + 1))
if steps < 2:
    print("line one\\nline two: cannot go on"); sys.exit(7)
result.write_text(f"after {steps} halts")
"""


def halting(source, out, suffix=""):
    folder = out / "halting"
    command = python(HALTING + suffix, folder / "progress", folder / "result")
    return Stage("halting", folder, [command], [source], [folder / "result"])


def test_a_stage_that_failed_goes_on_in_the_folder_it_left(world):
    source, out = world
    for _ in range(2):
        with pytest.raises(StageError):
            run(out, halting(source, out))
    flow, _ = run(out, halting(source, out))
    assert (out / "halting" / "result").read_text() == "after 2 halts"
    assert "halting" in flow.seconds


def test_what_another_command_left_behind_is_cleared_away(world):
    source, out = world
    with pytest.raises(StageError):
        run(out, halting(source, out))
    with pytest.raises(StageError):
        run(out, halting(source, out, suffix="# another command"))
    assert (out / "halting" / "progress").read_text() == "1"


def test_a_folder_that_no_run_made_is_not_cleared(world, tmp_path):
    source, out = world
    (out / "first").mkdir()
    (out / "first" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no earlier run made it"):
        run(out, *two_stages(source, out, tmp_path))
    assert (out / "first" / "thesis.txt").exists()


def test_a_failure_shows_the_last_lines_and_where_the_log_is(world):
    source, out = world
    with pytest.raises(StageError) as caught:
        run(out, halting(source, out))
    message = str(caught.value)
    assert "exit code 7" in message and "line two: cannot go on" in message
    assert str(out / "logs" / "halting.log") in message


def test_a_command_that_writes_nothing_is_not_taken_as_done(world):
    source, out = world
    stage = Stage("idle", out / "idle", [python("pass")], [source], [out / "idle" / "result"])
    for _ in range(2):
        with pytest.raises(StageError, match="without writing"):
            run(out, stage)


def test_a_missing_input_is_told(world):
    source, out = world
    with pytest.raises(InputError, match=r"missing\.txt: no such file; stage first needs it"):
        run(out, Stage("first", out / "first", [python("pass")], [source.with_name("missing.txt")], []))


# --- stages with a server -------------------------------------------------------------------------------------------

ASK = """
import sys, urllib.request
with urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health"):
    open(sys.argv[2], "w").write("asked")
"""


def served(source, out, command, server=None):
    folder = out / "ask"
    server = server or python(SERVER, PORT, out / "left")
    return Stage("ask", folder, [command], [source], [folder / "result"], server, "serve")


def test_a_server_answers_while_its_stage_runs_and_is_gone_afterwards(world):
    source, out = world
    flow, _ = run(out, served(source, out, python(ASK, PORT, out / "ask" / "result")))
    assert (out / "ask" / "result").read_text() == "asked"
    assert (out / "left").read_text() == "left"
    assert list(flow.seconds) == ["serve", "ask"] and flow.seconds["serve"] >= 0.3


def test_a_server_is_stopped_when_its_stage_fails(world):
    source, out = world
    with pytest.raises(StageError, match="exit code 3"):
        run(out, served(source, out, python("import sys; sys.exit(3)")))
    assert (out / "left").read_text() == "left"


def test_a_server_that_does_not_start_is_told_with_its_log(world):
    source, out = world
    broken = python("print('no such model'); raise SystemExit(2)")
    with pytest.raises(StageError, match=r"(?s)the server ended.*no such model.*serve\.log"):
        run(out, served(source, out, python("pass"), broken))


INTERRUPTED = """
import sys, time
from pathlib import Path
from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.pipeline.runner import Flow, Stage
source, out, server, stay = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
stage = Stage("ask", out / "ask", [[sys.executable, "-c", stay, str(out / "ask" / "result")]], [source],
              [out / "ask" / "result"], [sys.executable, "-c", server, "{port}", str(out / "left")], "serve")
exit_with_message(lambda: Flow(out).run(stage))
"""
STAY = """
import pathlib, sys, time
here = pathlib.Path(sys.argv[1]).with_name("started")
again = here.exists()
here.write_text("")
if not again:
    try: time.sleep(60)
    except KeyboardInterrupt: here.with_name("saved").write_text(""); raise SystemExit(75)
pathlib.Path(sys.argv[1]).write_text("done")
"""


def test_ctrl_c_lets_the_command_save_stops_the_server_and_the_next_run_goes_on(world):
    source, out = world
    argv = python(INTERRUPTED, source, out, SERVER, STAY)
    first = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "ask" / "started").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130 and "run the same command again" in err and "Traceback" not in err
    assert (out / "ask" / "saved").exists() and (out / "left").read_text() == "left"
    second = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert second.returncode == 0, second.stderr
    assert (out / "ask" / "result").read_text() == "done"
    state = json.loads((out / "state.json").read_text())
    assert state["ask"]["done"] and state["ask"]["seconds"]["serve"] >= 0.6  # both starts are counted


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_a_killed_flow_leaves_no_server_behind(world):
    source, out = world
    killed = subprocess.Popen(python(INTERRUPTED, source, out, SERVER.replace("SIGINT", "SIGTERM"), STAY))
    deadline = time.monotonic() + 60
    while not (out / "ask" / "started").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    while not (out / "left").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- the demo itself ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import demo
    finally:
        sys.path.pop(0)
    return demo


@pytest.mark.parametrize("data", [None, Path("trees.jsonl.gz")])
def test_every_stage_of_the_demo_reads_what_an_earlier_one_writes(demo, data, monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["demo.py", "--output_dir", str(tmp_path)] + (["--data", str(data)] if data else [])
    )
    written, names = {data} - {None}, []
    for stage in demo.stages(demo.parse_args()):
        assert set(stage.inputs) <= written, stage.name
        assert all(stage.folder in path.parents for path in stage.outputs), stage.name
        commands = [*stage.commands, *([stage.server] if stage.server else [])]
        assert all(Path(command[1]).is_file() for command in commands)
        # What a command is told to read must be an input, or a change of it would go unnoticed.
        told = {Path(part.split("=", 1)[-1]) for command in commands for part in command[2:]}
        assert told & written <= set(stage.inputs), stage.name
        written |= set(stage.outputs)
        names.append(stage.name)
    assert len(names) == len(set(names))


def test_the_first_stages_of_the_demo_run_and_are_skipped_the_next_time(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path / "demo"), "--num_trees", "60"])
    wanted = ("world", "base", "preprocess", "clean")
    for expected in ("...", "done before"):
        stages = {stage.name: stage for stage in demo.stages(demo.parse_args())}
        _, shown = run(tmp_path / "demo", *(stages[name] for name in wanted))
        assert all(f"[{name}] {expected}" in shown for name in wanted)
    assert len((tmp_path / "demo" / "clean" / "t2v_val.jsonl").read_text().splitlines()) > 20


def test_fresh_deletes_only_what_the_demo_made(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = subprocess.run(
        [sys.executable, SCRIPTS / "demo.py", "--fresh", "--output_dir", tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 2 and "--fresh would delete" in result.stderr
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_started_in_the_background_can_be_stopped_and_resumed(number, tmp_path):
    out = tmp_path / "demo"
    argv = [sys.executable, str(SCRIPTS / "demo.py"), "--num_trees", "60", "--output_dir", str(out)]
    # Shells start background jobs with SIGINT ignored.
    first = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    deadline = time.monotonic() + 60
    while not (out / "convert").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(number)
    shown, err = first.communicate(timeout=90)
    assert first.returncode == 130 and "run the same command again" in err and "Traceback" not in err
    state = json.loads((out / "state.json").read_text())
    assert state["world"]["done"] and state["base"]["done"] and "[world]" in shown


def test_data_that_is_not_there_is_told_before_anything_runs(tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPTS / "demo.py", "--data", "missing.jsonl.gz", "--output_dir", tmp_path / "demo"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert result.returncode == 2 and "missing.jsonl.gz: no such file" in result.stderr
    assert not (tmp_path / "demo").exists()
