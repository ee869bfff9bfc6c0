"""The command line as a whole: commands load by name and quickly, and options have two spellings."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from diffusers_imagen.commands import main as cli
from diffusers_imagen.commands.main import COMMANDS, commands_of, make_parser
from diffusers_imagen.training import DreamBoothTrainingConfig, LoraTrainingConfig, TrainingConfig
from diffusers_imagen.training.options import OneLineErrors, OptionParser
from diffusers_imagen.utils.flags import BothSpellings, respell


ROOT = Path(__file__).parents[2]
SLOW = {"accelerate", "datasets", "diffusers", "gradio", "matplotlib", "torch", "transformers"}
TRAINING = ("train", "train-lora", "train-dreambooth")  # whose options are the fields of configurations
PARSERS = commands_of(make_parser())


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


# Commands


# each `--help` in a process of its own, which had nothing imported before
HELP_OF_ALL = """
import contextlib, io, json, os, sys
for arguments in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                from diffusers_imagen.commands.main import main
                main(arguments)
            except SystemExit as exit:
                code = exit.code
        print(json.dumps([arguments, code, out.getvalue(), list(sys.modules)]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_help_imports_nothing_that_is_slow():
    calls = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    done = python("-c", HELP_OF_ALL, json.dumps(calls))
    assert done.returncode == 0 and done.stderr == ""
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [arguments for arguments, *_ in results] == calls
    # of training, whose parser takes a configuration; transformers 5.4 imports torch itself
    brought = set(python("-c", "import sys, transformers; print(*sys.modules)").stdout.split())
    for arguments, code, out, modules in results:
        slow = SLOW - brought if arguments[0] in TRAINING else SLOW
        assert code == 0 and set(modules) & slow == set(), arguments
        assert out.startswith(version("diffusers-imagen") if arguments == ["--version"] else "usage: diffusers-imagen")
        loaded = {name.rpartition(".")[2] for name in modules if name.startswith("diffusers_imagen.commands.")}
        assert loaded & {command.module for command in COMMANDS.values()} <= expected_modules(arguments), arguments


def expected_modules(arguments: list[str]) -> set[str]:
    """The command that was named, and those whose parts it uses."""
    if arguments[0] not in COMMANDS:
        return set()
    parts = {"evaluate": {"generate"}, "export-if": {"convert_if"}, "export-nemo": {"convert_nemo"}}
    return {COMMANDS[arguments[0]].module, *parts.get(arguments[0], ())}


@pytest.mark.parametrize("command, name", [("export-nemo", "folder"), ("export-if", "model")])
def test_the_folder_of_an_adapter_is_not_exported(run, tmp_path, command, name):
    (tmp_path / "style" / "unet").mkdir(parents=True)
    (tmp_path / "style" / "unet" / "reference.json").write_text("{}")
    (tmp_path / "style" / "pytorch_lora_weights.safetensors").touch()
    code, _, error = run(command, str(tmp_path / "style"), "--output", str(tmp_path / "out"))
    assert code == 2 and not (tmp_path / "out").exists()
    assert f"`{name}` is '{tmp_path / 'style'}', the folder of a LoRA adapter: merge it into" in error[-1]


def test_the_list_of_commands_has_a_line_for_each(run):
    code, out, error = run("--help")
    text = " ".join(out.split())
    assert code == 0 and error == []
    assert all(f" {name} {command.help}" in text for name, command in COMMANDS.items())
    assert list(PARSERS) == list(COMMANDS)
    for name, command in COMMANDS.items():
        module = importlib.import_module(f"diffusers_imagen.commands.{command.module}")
        assert callable(PARSERS[name].get_default("run"))
        assert module.__doc__.startswith(f"`diffusers-imagen {name}`")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generates", "a"], "there is no command 'generates': did you mean generate? (see diffusers-imagen --help)"),
        (["cache_embeddings"], "there is no command 'cache_embeddings': did you mean cache-embeddings?"),
        (["x"], f"there is no command 'x': the commands are {', '.join(COMMANDS)}"[:450]),
        (["--nothing", "x"], "there is no command 'x'"),
        (["generate", "a", "--num_image", "2"], "there is no option --num_image: did you mean --num-images?"),
        (["cache-embeddings", "--output-dir", "x"], "there is no option --output-dir: pass the output_dir without it"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'"),
    ],
)
def test_what_may_have_been_meant_is_said(run, arguments, message):
    code, out, error = run(*arguments)
    assert (code, out, len(error)) == (2, "", 1) and message in error[0], error


def test_an_interruption_while_a_command_loads_is_no_traceback(run, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert run("generate", "a") == (130, "", [])


def test_the_package_runs_as_the_command():
    done = python("-m", "diffusers_imagen", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, version("diffusers-imagen") + "\n", "")
    assert python("-m", "diffusers_imagen").returncode == 2


def test_help_that_nobody_reads_is_no_traceback():
    command = f'set -o pipefail; "{sys.executable}" -m diffusers_imagen generate --help | true'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr.count("\n") <= 1 and "Traceback" not in done.stderr


# Options


def spellings(option: str) -> set[str]:
    return {option, "--" + option[2:].replace("-", "_"), "--" + option[2:].replace("_", "-")}


def values_of(action: argparse.Action) -> list[str]:
    """Values that an option takes."""
    if action.nargs == 0:
        return []
    value = "1" if action.choices is None else str(next(iter(action.choices)))
    return [value] * (action.nargs if isinstance(action.nargs, int) else 1)


def parsed(parser: argparse.ArgumentParser, action: argparse.Action, option: str, joined: bool = False):
    """What an option is taken for: the rest of the line is not asked for."""
    values = values_of(action)
    given = [f"{option}={values[0]}"] if joined else [option, *values]
    return getattr(parser.parse_args(given), action.dest)


def assert_takes_both(parser: argparse.ArgumentParser) -> int:
    count = 0
    for action in parser._actions:
        action.required = False
    for group in parser._mutually_exclusive_groups:
        group.required = False
    for action in [action for action in parser._actions if action.option_strings and action.dest != "help"]:
        for own in action.option_strings:
            for option in spellings(own):
                value = parsed(parser, action, option)
                assert value == parsed(parser, action, own) and value is not None, option
                if action.nargs is None:
                    assert parsed(parser, action, option, joined=True) == value
                count += len(spellings(own)) > 1
    return count


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_taken_in_both_spellings(name):
    parser = commands_of(make_parser([name]))[name]
    options = [option for action in parser._actions for option in action.option_strings]
    assert [option for option in options if "_" in option] == []  # one is shown
    assert_takes_both(parser)


@pytest.mark.parametrize("config_class", [TrainingConfig, LoraTrainingConfig, DreamBoothTrainingConfig])
def test_every_option_of_the_training_scripts_is_taken_in_both_spellings(config_class):
    parser = OptionParser(config_class, allow_abbrev=False)
    options = [option for action in parser._actions for option in action.option_strings]
    assert [option for option in options if "-" in option[2:]] == []
    assert assert_takes_both(parser) > 100


def test_messages_show_the_spelling_of_the_help(run):
    for option in ("--num-images", "--num_images"):
        code, _, error = run("generate", "a", option, "x")
        assert code == 2 and "argument --num-images: invalid int value: 'x'" in error[0]
    with pytest.raises(ValueError, match="argument --max_train_steps: invalid int value: 'x'; --help lists"):
        OptionParser(TrainingConfig, allow_abbrev=False).parse_args(["--max-train-steps", "x"])


def test_what_is_no_option_is_not_respelled():
    options = ["--text-encoder", "--keep_it", "-x"]
    line = ["a_b", "--text_encoder=a_b", "--keep-it", "--no_such", "-x_y", "--", "--text_encoder"]
    expected = ["a_b", "--text-encoder=a_b", "--keep_it", "--no_such", "-x_y", "--", "--text_encoder"]
    assert respell(line, options) == expected
    parser = BothSpellings(allow_abbrev=False)
    parser.add_argument("--same_word", "--same-word")
    parser.add_argument("--same-words")
    assert [action.option_strings for action in parser._actions[1:]] == [["--same_word"], ["--same-words"]]
    assert parser.parse_args(["--same-word", "a", "--same_words=b_c"]) == argparse.Namespace(
        same_word="a", same_words="b_c"
    )
    with pytest.raises(ValueError, match="unrecognized arguments: --same_wor"):  # no abbreviations
        OneLineErrors(allow_abbrev=False).parse_args(["--same_wor", "a"])


def test_messages_name_the_options_of_python_arguments():
    parser = PARSERS["generate"]
    assert (
        parser.with_flags("`num_inference_steps` has 3 entries.") == "`num_inference_steps` has 3 entries (--steps)."
    )
    assert parser.with_flags("`text_encoder` is 'x', no folder.") == "`text-encoder` is 'x', no folder."
    assert parser.with_flags("`steps` is 'text_encoder'.") == "`steps` is 'text_encoder'."
    both = "`num_images_per_prompt` is 2, but `output_resolution` is 3; see --resolution."
    assert parser.with_flags(both) == both.replace(".", " (--num-images).")


def test_the_documentation_names_options_that_there_are():
    found = 0
    for page in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        names = "|".join(sorted(COMMANDS.keys() - set(TRAINING)))
        for name, arguments in re.findall(rf"diffusers[-_]imagen ({names})\b([^`\n|]*)", text):
            known = {option for action in PARSERS[name]._actions for option in action.option_strings}
            options = re.findall(r"(?<![\w-])--[a-z][\w-]*", arguments)
            assert set(options) <= known, (page.name, name)
            found += len(options)
    assert found > 20


# Completion


def test_completion_is_a_script_for_each_shell(run, monkeypatch):
    pytest.importorskip("shtab", reason="completion needs shtab: pip install 'diffusers-imagen[completion]'")
    for shell in ("bash", "zsh", "fish"):
        code, out, error = run("completion", shell)
        assert code == 0 and error == []
        assert all(text in out for text in ("--num-images", "cache-embeddings", "--max_train_steps"))


COMPLETE = """
complete_line() {
    COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
    $(complete -p diffusers-imagen | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    echo "${COMPREPLY[*]}"
}
complete_line diffusers-imagen ge
complete_line diffusers-imagen generate --num
complete_line diffusers-imagen generate --scheduler ''
complete_line diffusers-imagen inpaint pict
"""


def test_bash_completes_commands_options_choices_and_files(run, folder):
    pytest.importorskip("shtab", reason="completion needs shtab: pip install 'diffusers-imagen[completion]'")
    script = run("completion", "bash")[1] + COMPLETE
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["generate", "--num-images", "model adams heun", "picture.png"], done.stderr


def test_completion_without_its_package_names_the_extra(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, error = run("completion", "bash")
    assert (code, out) == (2, "")
    assert error == ["diffusers-imagen: error: completion needs shtab: pip install 'diffusers-imagen[completion]'"]


def test_a_default_is_found_when_the_command_runs():
    """torch looks for the device, and `--help` need not import it."""
    args = make_parser(["generate"]).parse_args(["generate", "a"])
    assert str(args.device) == "cuda if available, else cpu" and not isinstance(args.device, str)
    cli.find_defaults(args)
    assert args.device in ("cpu", "cuda")
