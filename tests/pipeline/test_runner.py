import hashlib
import io
import json
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steerlm_nemo.errors import InputError
from steerlm_nemo.pipeline import runner
from steerlm_nemo.pipeline.flow import Flow, Server, Stage
from steerlm_nemo.pipeline.processes import StageError, StoppedEarlyError

PORT = "{serve.port}"

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


class Python:
    """Starts commands of Python code instead of scripts."""

    stop_signal = signal.SIGINT

    def argv(self, command, size):
        return [sys.executable, "-c", *command]


def python(code, *argv):
    return (code, *map(str, argv))


def stage(name, commands, inputs, outputs, **more):
    return Stage(name, outputs[0].parent, tuple(commands), tuple(inputs), tuple(outputs), **more)


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


def run(out, *stages, **options):
    """Run the stages; returns the manifest and what was shown."""
    shown = io.StringIO()
    runner.run(Flow("test", out, stages, {}), stages, Python(), show=shown, **options)
    return manifest(out), shown.getvalue()


def manifest(out):
    return json.loads((out / "manifest.json").read_text())["stages"]


def two_stages(source, out, tmp_path, text="a"):
    first, second = out / "first" / "result", out / "second" / "result"
    copy = "import sys; open(sys.argv[2], 'w').write(open(sys.argv[1]).read().upper());"
    copy += "open(sys.argv[3], 'a').write('run\\n')"
    return (
        stage("first", [writes(first, text, tmp_path / "runs1")], [source], [first]),
        stage("second", [python(copy, first, second, tmp_path / "runs2")], [first], [second]),
    )


def test_a_second_run_does_nothing_and_remembers_the_times(world, tmp_path):
    source, out = world
    before, _ = run(out, *two_stages(source, out, tmp_path))
    after, shown = run(out, *two_stages(source, out, tmp_path))
    assert (num_runs(tmp_path / "runs1"), num_runs(tmp_path / "runs2")) == (1, 1)
    assert list(after) == ["first", "second"] and after == before
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
    return stage("halting", [command], [source], [folder / "result"])


def test_a_stage_that_failed_goes_on_in_the_folder_it_left(world):
    source, out = world
    for _ in range(2):
        with pytest.raises(StageError):
            run(out, halting(source, out))
    stages, shown = run(out, halting(source, out))
    assert (out / "halting" / "result").read_text() == "after 2 halts"
    assert "[halting] goes on" in shown and stages["halting"]["done"]


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
    idle = stage("idle", [python("pass")], [source], [out / "idle" / "result"])
    for _ in range(2):
        with pytest.raises(StageError, match="stage idle: it ended without writing"):
            run(out, idle)


def test_a_missing_input_is_told(world):
    source, out = world
    with pytest.raises(InputError, match=r"missing\.txt: no such file; stage first needs it"):
        run(out, stage("first", [python("pass")], [source.with_name("missing.txt")], [out / "first" / "result"]))
    assert not (out / "first").exists()


@pytest.mark.parametrize("code", [75, 143, "kill"])
def test_a_command_that_was_stopped_in_time_says_that_the_flow_goes_on(world, code):
    source, out = world
    leave = "os.kill(os.getpid(), 15)" if code == "kill" else f"sys.exit({code})"
    stopped = stage("train", [python(f"import os, sys; {leave}")], [source], [out / "train" / "result"])
    with pytest.raises(StoppedEarlyError, match="stage train: stopped early") as caught:
        run(out, stopped)
    assert caught.value.exit_code == 75


def test_a_failure_ends_with_the_code_of_its_command(world):
    source, out = world
    with pytest.raises(StageError) as caught:
        run(out, halting(source, out))
    assert caught.value.exit_code == 7


def test_an_output_that_somebody_changed_is_made_again(world, tmp_path):
    source, out = world
    run(out, *two_stages(source, out, tmp_path))
    (out / "first" / "result").write_text("b")
    _, shown = run(out, *two_stages(source, out, tmp_path))
    assert f"[first] again: {out}/first/result was changed by somebody else" in shown
    assert (num_runs(tmp_path / "runs1"), num_runs(tmp_path / "runs2")) == (2, 1)
    assert (out / "first" / "result").read_text() == "a"


def test_a_file_that_was_only_touched_changes_nothing(world, tmp_path):
    source, out = world
    run(out, *two_stages(source, out, tmp_path))
    source.write_text("one")
    _, shown = run(out, *two_stages(source, out, tmp_path))
    assert "[first] done before" in shown and num_runs(tmp_path / "runs1") == 1


def test_a_changed_file_in_an_input_folder_is_noticed(world):
    source, out = world
    folder = source.with_name("model")
    folder.mkdir()
    for text in ("a", "b"):
        (folder / "weights").write_text(text)
        convert = stage("convert", [writes(out / "convert" / "result")], [folder], [out / "convert" / "result"])
        _, shown = run(out, convert)
    assert f"[convert] again: {folder} changed" in shown


def test_the_manifest_says_what_was_read_run_and_written_by_what(world, tmp_path):
    source, out = world
    first = run(out, *two_stages(source, out, tmp_path))[0]["first"]
    assert first["inputs"] == {str(source): hashlib.sha256(b"one").hexdigest()}
    assert first["outputs"] == {str(out / "first" / "result"): hashlib.sha256(b"a").hexdigest()}
    assert len(first["commands"]) == 1 and str(out / "first" / "result") in first["commands"][0]
    assert first["versions"]["python"] == platform.python_version() and "nemo_toolkit" in first["versions"]
    assert first["seconds"]["first"] >= 0 and first["done"] is True


@pytest.mark.parametrize("text", ["{", "3", '"text"'])
def test_a_damaged_manifest_is_told(world, tmp_path, text):
    source, out = world
    (out / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        run(out, *two_stages(source, out, tmp_path))


def test_fresh_runs_all_again_in_emptied_folders(world, tmp_path):
    source, out = world
    run(out, *two_stages(source, out, tmp_path))
    (out / "first" / "rest").touch()
    run(out, *two_stages(source, out, tmp_path), fresh=True)
    assert (num_runs(tmp_path / "runs1"), num_runs(tmp_path / "runs2")) == (2, 2)
    assert not (out / "first" / "rest").exists()


def test_a_stage_in_sight_runs_every_time_knows_the_times_and_gives_its_exit_code(world, tmp_path):
    source, out = world
    look = "import sys; given = sys.argv[2].removeprefix('--stages_file=');"
    look += "open(sys.argv[1], 'a').write(open(given).read() + '\\n'); sys.exit(1)"
    look = python(look, tmp_path / "seen")
    sight = Stage("report", out / "report", (look,), (source,), (), in_sight=True)
    stages = (*two_stages(source, out, tmp_path), sight)
    for _ in range(2):
        assert runner.run(Flow("test", out, stages, {}), stages, Python(), show=io.StringIO()) == 1
    seen = (tmp_path / "seen").read_text().splitlines()
    assert len(seen) == 2 and list(json.loads(seen[0])) == ["first", "second"]


# --- stages with a server -------------------------------------------------------------------------------------------

ASK = """
import sys, urllib.request
with urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health"):
    open(sys.argv[2], "w").write("asked")
"""


def served(source, out, command, server=None):
    servers = (Server("serve", server or python(SERVER, PORT, out / "left"), 1424),)
    return stage("ask", [command], [source], [out / "ask" / "result"], servers=servers)


def test_a_server_answers_while_its_stage_runs_and_is_gone_afterwards(world):
    source, out = world
    stages, _ = run(out, served(source, out, python(ASK, PORT, out / "ask" / "result")))
    assert (out / "ask" / "result").read_text() == "asked"
    assert (out / "left").read_text() == "left"
    seconds = stages["ask"]["seconds"]
    assert list(seconds) == ["ask.serve-serve", "ask"] and seconds["ask.serve-serve"] >= 0.3


def test_several_servers_run_beside_one_another(world):
    source, out = world
    ask = "import sys, urllib.request as r; [r.urlopen(f'http://127.0.0.1:{p}/health') for p in sys.argv[2:]];"
    ask += "open(sys.argv[1], 'w').write('asked')"
    names = ("value", "reward")
    servers = tuple(Server(n, python(SERVER, f"{{{n}.port}}", out / f"left-{n}"), 1424) for n in names)
    command = python(ask, out / "ask" / "result", "{value.port}", "{reward.port}")
    stages, _ = run(out, stage("ask", [command], [source], [out / "ask" / "result"], servers=servers))
    assert list(stages["ask"]["seconds"]) == ["ask.serve-value", "ask.serve-reward", "ask"]
    assert [(out / f"left-{name}").read_text() for name in names] == ["left", "left"]


def test_a_server_is_stopped_when_its_stage_fails(world):
    source, out = world
    with pytest.raises(StageError, match="exit code 3"):
        run(out, served(source, out, python("import sys; sys.exit(3)")))
    assert (out / "left").read_text() == "left"


def test_a_server_that_does_not_start_is_told_with_its_log(world):
    source, out = world
    broken = python("print('no such model'); raise SystemExit(2)")
    with pytest.raises(StageError, match=r"(?s)the server ended.*no such model.*ask\.serve-serve\.log"):
        run(out, served(source, out, python("pass"), broken))


INTERRUPTED = """
import sys
from pathlib import Path
from steerlm_nemo.errors import exit_with_message
from test_runner import PORT, python, run, served
source, out, server, stay = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
asked = served(source, out, python(stay, out / "ask" / "result"), python(server, PORT, out / "left"))
exit_with_message(lambda: run(out, asked))
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


def interrupted(source, out, server=SERVER):
    """The command line of a flow in a process of its own."""
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    return [sys.executable, "-c", here + INTERRUPTED, *map(str, (source, out, server, STAY))]


def test_ctrl_c_lets_the_command_save_stops_the_server_and_the_next_run_goes_on(world):
    source, out = world
    argv = interrupted(source, out)
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
    entry = manifest(out)["ask"]
    assert entry["done"] and entry["seconds"]["ask.serve-serve"] >= 0.6  # both starts are counted


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_a_killed_flow_leaves_no_server_behind(world):
    source, out = world
    killed = subprocess.Popen(interrupted(source, out, SERVER.replace("SIGINT", "SIGTERM")))
    deadline = time.monotonic() + 60
    while not (out / "ask" / "started").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    while not (out / "left").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
