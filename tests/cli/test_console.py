import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from coat_deploy.cli import app as door
from coat_deploy.cli import console
from coat_deploy.cli.tables import format_cell, format_share, render_facts, render_table
from coat_deploy.errors import BelowBar, UsageError

COMMANDS = ("export", "validate", "bench", "predict", "selftest", "models", "doctor")


@pytest.mark.parametrize("command", COMMANDS[:5])
def test_every_commands_help_fits_80_columns_and_ends_in_examples(command, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    help = cli(command, "--help")
    assert help.status == 0
    lines = help.out.splitlines()
    assert max(map(len, lines)) <= 80
    examples = [line.strip() for line in lines if line.strip().startswith("$ ")]
    assert examples and all(line.startswith(f"$ coat-deploy {command} ") for line in examples)
    assert "…" not in help.out  # nothing was cut off


def test_help_names_every_command(cli):
    help = cli("--help")
    assert help.status == 0
    assert all(re.search(rf"^│ {command} ", help.out, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", ["", *door.EXAMPLES])
def test_examples_use_options_that_exist(command, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for line in door.EXAMPLES[command].split("\n"):
        if line.split()[1:2] == ["curl"]:  # another's options
            continue
        used = re.findall(r"--[a-z-]+", line)
        named = line.split()[2:3]
        help = cli(*named, "--help").out if used else ""
        assert all(f"{option} " in help for option in used), line


def test_no_arguments_print_the_help(cli):
    ran = cli()
    assert ran.status == 2
    assert "Usage: coat-deploy" in ran.out
    assert ran.err == ""


def test_version_is_printed_alone(cli):
    ran = cli("--version")
    assert (ran.status, ran.err) == (0, "")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", ran.out)


def test_help_needs_neither_torch_nor_a_runtime_and_is_quick():
    code = (
        "import sys, time\nstart = time.process_time()\n"
        "from coat_deploy.cli.app import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'onnx', 'numpy'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), time.process_time() - start, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    found = re.search(r"HEAVY \[\] ([\d.]+)", done.stderr)
    assert found, done.stderr
    # Processor time: the machine may be busy. Twice as much as was measured.
    assert float(found[1]) < 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("exprot", "m"), "No such command 'exprot'"),
        (("export",), "Missing argument 'MODEL'"),
        (("validate", "m"), "give either --images or --data"),
        (("export", "m", "--tarjet", "openvino"), "--target"),
        (("selftest", "m", "--threads", "0"), "must be 1 to 1024 (got 0)"),
        (("selftest", "m", "--threads", "many"), "'--threads'"),
        (("predict", "m"), "Missing argument 'IMAGE'"),
    ],
)
def test_wrong_usage_is_one_line_on_stderr_and_status_2(words, said, cli):
    ran = cli(*words)
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.err
    assert ran.err.count("\n") == 1 and ran.err.startswith("coat-deploy: ")
    assert ran.err.rstrip().endswith("--help")


def test_an_option_for_all_commands_behind_the_command_is_told_its_place(cli):
    ran = cli("selftest", "coat_tiny", "--debug")
    assert ran.status == 2
    assert "coat-deploy --debug COMMAND" in ran.err


def test_debug_shows_the_trace_and_keeps_the_status(cli, tmp_path):
    plain = cli("selftest", "coat_tini")
    traced = cli("--debug", "selftest", "coat_tini")
    assert plain.status == traced.status == 2
    assert "Traceback" not in plain.err
    assert "Traceback" in traced.err and traced.err.splitlines()[-1] == plain.err.rstrip()


def wrapped(error: BaseException) -> Callable[[], None]:
    @console.guarded
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UsageError("a name: is wrong."), 2, "a name: is wrong."),
        (BelowBar("an artifact: no."), 3, "an artifact: no."),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "--batch"),
    ],
)
def test_a_failing_command_says_one_line_and_exits(error, status, said, capsys, monkeypatch):
    monkeypatch.setitem(console.settings, "debug", False)
    with pytest.raises(typer.Exit) as left:
        wrapped(error)()
    assert left.value.exit_code == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(("number", "word"), console.SIGNALS.items())
def test_a_signal_is_an_interrupt_whatever_error_it_becomes(number, word, capsys, monkeypatch):
    """A signal that meets the import of an extension makes an ImportError of it."""
    monkeypatch.setitem(console.settings, "debug", False)
    before = signal.signal(number, signal.SIG_DFL)  # ignored by nohup, for example

    @console.guarded
    def command() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt as interrupt:
            raise ImportError("initialization failed") from interrupt

    try:
        with pytest.raises(typer.Exit) as left:
            command()
    finally:
        signal.signal(number, before)
    assert left.value.exit_code == 128 + number
    assert capsys.readouterr().err.startswith(f"coat-deploy: {word}; ")


def test_our_own_mistakes_show_their_trace():
    with pytest.raises(AssertionError, match="ours"):
        wrapped(AssertionError("ours"))()


def test_a_message_of_several_lines_becomes_one(capsys):
    with pytest.raises(typer.Exit):
        console.fail("first\n  second", 1)
    assert capsys.readouterr().err == "coat-deploy: first second\n"


def test_handlers_of_signals_are_put_back(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit):
        wrapped(UsageError("no."))()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_ignored_stays_ignored():
    seen = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        console.guarded(lambda: seen.append(signal.getsignal(signal.SIGHUP)))()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN]


def test_json_refuses_what_is_not_json():
    with pytest.raises(ValueError, match="JSON"):
        console.print_json({"loss": float("nan")})


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_checkout_without_what_the_command_line_needs_says_so(package):
    """As `python cli.py gpu-report` where nothing was installed."""
    path = Path(door.__file__).parents[2] / "cli.py"
    code = f"import runpy, sys\nsys.modules[{package!r}] = None\n"
    code += f"runpy.run_path({str(path)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"coat-deploy: package {package} is not installed")
    assert "python -m coat_deploy.gpu_report" in done.stderr


def test_results_survive_a_reader_that_leaves(bare):
    """As in `coat-deploy models | head -1`: no trace, and the status of the work."""
    command = [sys.executable, str(Path(door.__file__).parents[2] / "cli.py")]
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [*command, "models", "--models", str(bare), "--json"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_behind_stdout_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    code = "from coat_deploy.cli import console\nconsole.guarded(console.print_json)({})"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert done.stderr.startswith(b"coat-deploy: stdout: cannot be written (No space left")


def test_closed_streams_do_no_harm():
    root = Path(door.__file__).parents[2]
    shell = f"{sys.executable} {root}/cli.py selftest nosuch >&- 2>&-"
    assert subprocess.run(["sh", "-c", shell], timeout=60).returncode == 2


def test_file_names_that_are_not_utf8_are_printed(tmp_path):
    code = (
        "import sys\nfrom coat_deploy.cli import app, console\napp._open_streams()\n"
        "console.emit(sys.argv[1])\nconsole.note(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, b"\xff.jpg"], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, rb"\udcff.jpg")


def test_pillows_warnings_are_kept_from_the_user():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        console.configure(debug=False, verbose=False)
        warnings.warn_explicit("Corrupt EXIF", UserWarning, "x.py", 1, "PIL.TiffImagePlugin")
        warnings.warn_explicit("Other", UserWarning, "x.py", 1, "elsewhere")
    assert [str(warning.message) for warning in told] == ["Other"]


def terminal(command: list[str], **changes: str) -> str:
    """Run a command with a terminal for stderr and stdout; return what it would show."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", **changes}
    )
    os.close(theirs)
    shown = b""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            shown += part
        elif process.poll() is not None:
            break
    os.close(ours)
    assert process.wait(10) == 0
    return shown.decode()


SHOW = """
import sys, time
from coat_deploy.cli import console
with console.progress_bar("counting", 2) as advance:
    advance(1); time.sleep(0.3); advance(1)
with console.steps("walking") as tell:
    tell("uphill [1]"); time.sleep(0.3)
console.hint("Next: rest")
console.emit(console.styled("PASSED", "green") + "\\n")
"""


def test_progress_and_hints_are_shown_on_a_terminal():
    shown = terminal([sys.executable, "-c", SHOW])
    assert "counting" in shown and "1/2" in shown
    assert "walking: uphill [1]" in shown
    assert "Next: rest" in shown
    assert "\x1b[32m" in shown  # green


def test_no_color_is_heeded():
    shown = terminal([sys.executable, "-c", SHOW], NO_COLOR="1")
    assert "\nPASSED" in shown
    assert "\x1b[32m" not in shown


def test_progress_and_hints_are_silent_elsewhere():
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("PASSED\n", "")


@pytest.fixture
def completing(monkeypatch) -> Iterator[Callable[..., str]]:
    def complete(*words: str) -> str:
        environment = {
            "_COAT_DEPLOY_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(("coat-deploy", *words)),
            "COMP_CWORD": str(len(words)),
        }
        done = subprocess.run(
            [sys.executable, "-c", "from coat_deploy.cli.app import main; main()"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    return complete


def test_the_shell_completes_commands_options_and_models(completing, bare):
    assert completing("val").split() == ["validate"]
    assert completing("bench", "--stab").split() == ["--stability"]
    assert completing("validate", "coat_lite_m").split() == [
        "coat_lite_medium",
        "coat_lite_medium_384",
        "coat_lite_mini",
    ]
    assert completing("validate", "--models", str(bare), "coat_lite_to").split() == [
        "coat_lite_toy"
    ]


def test_a_completion_script_is_printed(script):
    ran = script(_COAT_DEPLOY_COMPLETE="source_bash")
    assert "complete -o" in ran.out and "coat-deploy" in ran.out


def test_tables_align_numbers_right_and_text_left():
    rows = [("a", 1.0, True, "1.5x"), ("long", 12.25, None, "10x")]
    text = render_table(("name", "ms", "ok", "ratio"), rows, "times")
    assert text.splitlines() == [
        "times",
        "name     ms  ok   ratio",
        "a         1  yes   1.5x",
        "long  12.25  -      10x",
    ]


def test_tables_count_wide_characters_as_two_columns():
    lines = render_table(("", ""), [("猫", "x"), ("abcd", "y")]).splitlines()
    assert lines == ["猫    x", "abcd  y"]


def test_a_long_last_column_is_folded_below_itself():
    text = render_table(("a", "b"), [("1", "word " * 12)], width=30)
    first, *rest = text.splitlines()[1:]
    assert len(rest) > 1 and max(map(len, rest)) <= 30
    assert all(line.startswith("   word") for line in rest)
    assert first.startswith("1  word")


def test_markup_in_cells_is_text():
    assert "[bold]" in render_facts([("name", "[bold]")])


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "-"), (True, "yes"), (0.5, "0.5"), (1.234567e-7, "1.23e-07"), (12345, "12345")],
)
def test_cells_are_written_for_people(cell, text):
    assert format_cell(cell) == text


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100.00%"), (0.999999, ">99.99%"), (0.5, "50.00%"), (None, None)]
)
def test_a_share_short_of_all_is_not_called_all(share, text):
    assert format_share(share) == text


@pytest.mark.parametrize("text", ["0", "x", "1,-2", "70000", "١", "9" * 5000, "1.5", ""])
def test_counts_refuse_what_is_no_count(text):
    with pytest.raises(UsageError, match="--batch"):
        console.counts(text, "batch")


def test_counts_come_once_each_in_order():
    assert console.counts("8, 1,8", "batch") == [8, 1]


def test_json_md_shows_objects_that_are_json():
    page = (Path(door.__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= len(COMMANDS)
    assert all(isinstance(json.loads(block), dict) for block in blocks)


@pytest.mark.parametrize(
    ("module", "extra"), [("onnx", "torch"), ("torch", "torch"), ("accelerate", "train")]
)
def test_a_package_that_a_command_lacks_is_one_line(module, extra, capsys):
    @console.guarded
    def command() -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    with pytest.raises(typer.Exit) as left:
        command()
    assert left.value.exit_code == 1
    assert f'Run: pip install "coat-deploy[{extra}]"' in capsys.readouterr().err
