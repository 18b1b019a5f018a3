"""A person's file to a module: the file is run, its class found, its arguments gathered, and one instance made.

The file is the person's own code, the only code that is ever run for them. What it prints goes to stderr, it leaves no
compiled files behind, and what goes wrong in it is said with its line.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError, close_matches, did_you_mean
from zoo.fit import from_config

if TYPE_CHECKING:
    from torch import nn

# What someone else's code can do wrong may end in any of these. KeyboardInterrupt is the person's, and goes through.
FAULTS = (Exception, SystemExit)
_NONE = inspect.Parameter.empty


@dataclass(frozen=True)
class Target:
    """An instance of a person's class, and where it comes from."""

    model: nn.Module
    file: Path
    name: str
    namespace: ModuleType
    notes: tuple[str, ...] = ()  # why this class, which arguments
    arguments: Mapping[str, Any] = field(default_factory=dict)  # that it was made with, defaults among them

    def __str__(self) -> str:
        return f"{self.name} in {self.file}"


def load(
    text: str,
    *,
    sets: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Target:
    """The target behind "FILE[:CLASS]". `sets` are arguments as typed, "hidden=384"; `config` gives what it can."""
    import torch

    file, wanted = split(text)
    namespace = run_file(file)
    make, why = choose(namespace, wanted, file)
    given, told = arguments(make, sets, config, file)
    torch.manual_seed(seed)
    with at_home(file), said(f"making {make.__name__} raised", file):
        model = make(**given)
    if not isinstance(model, torch.nn.Module):
        raise ZooError(f"{make.__name__} in {file} gave a {type(model).__name__}, which is no nn.Module", kind="file")
    defaults = {name: p.default for name, p in inspect.signature(make).parameters.items() if p.default is not _NONE}
    notes = tuple(note for note in (why, told) if note)
    return Target(model.eval(), file, make.__name__, namespace, notes, {**defaults, **given})


# ---------------------------------------------------------------------------------------------------- the file


def split(text: str) -> tuple[Path, str | None]:
    """ "FILE[:CLASS]" to its two halves. A file has to be there."""
    path, colon, name = text.rpartition(":")
    # A file may have a colon in its name, and a path on Windows has one behind its drive.
    if not colon or not name.isidentifier() or Path(text).is_file():
        path, name = text, ""
    file = Path(path)
    if file.is_dir():
        raise ZooError(f"{file} is a folder", kind="file", hint=f"name the file: {file / 'mymodel.py'}")
    if not file.is_file():
        raise ZooError(f"there is no file {file}", kind="file", hint=_nearby(file))
    if file.suffix != ".py":
        raise ZooError(
            f"{file} is not a Python file",
            kind="file",
            hint="name the file that defines your module, as in zoo graft REF mymodel.py",
        )
    return file, name or None


def _nearby(path: Path) -> str:
    try:
        names = sorted(each.name for each in path.parent.iterdir() if each.suffix == ".py")
    except OSError:
        return f"there is no folder {path.parent} either"
    found = close_matches(path.name, names)
    near = " or ".join(str(path.with_name(name)) for name in found)
    return f"did you mean {near}?" if near else f"relative paths start at {Path.cwd()}"


@contextlib.contextmanager
def at_home(file: Path) -> Iterator[None]:
    """Inside, the file's own folder is where imports look first, and what is printed goes to stderr."""
    home = str(_root(file))
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    sys.path.insert(0, home)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.dont_write_bytecode = before
        with contextlib.suppress(ValueError):
            sys.path.remove(home)


def _root(file: Path) -> Path:
    """The folder that imports start from: above the package, for a file that is in one."""
    folder = file.resolve().parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def run_file(file: Path) -> ModuleType:
    """Run a file as a module of its own; in a package, as the module that it is."""
    root, path = _root(file), file.resolve()
    if root == path.parent:
        name = f"_zoo_target_{file.stem}"  # not the bare name: a bert.py must not stand in the way of a library's
        while name in sys.modules:
            name += "_"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # the suffix is .py
        assert spec.loader is not None
        namespace = importlib.util.module_from_spec(spec)
        sys.modules[name] = namespace  # dataclasses and pickles look there
        try:
            with at_home(file), said("it does not run", file):
                spec.loader.exec_module(namespace)
        except BaseException:
            del sys.modules[name]
            raise
        return namespace
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    with at_home(file), said("it does not run", file):
        return importlib.import_module(name)


@contextlib.contextmanager
def said(what: str, file: Path) -> Iterator[None]:
    """Turn what a person's code raises into one message with the place in their file."""
    try:
        yield
    except ZooError:
        raise
    except FAULTS as error:
        raise theirs(what, file, error) from error


def theirs(what: str, file: Path, error: BaseException) -> ZooError:
    """The message for an exception in a person's code: the last line of theirs that it passed."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename or file}:{error.lineno}"
        return ZooError(f"{place}: {type(error).__name__}: {error.msg}", kind="file", hint="correct it, and run again")
    home = str(file.resolve().parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(home)]
    place = f" at {_short(frames[-1].filename, file)}:{frames[-1].lineno}" if frames else ""
    return ZooError(
        f"{file}: {what}: {one_line(error)}{place}", kind="file", hint=_remedy(error) or "-v shows the traceback"
    )


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__


def _short(filename: str, file: Path) -> str:
    return str(file) if Path(filename) == file.resolve() else Path(filename).name


def _remedy(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"install {error.name.partition('.')[0]} into this environment ({sys.prefix})"
    if isinstance(error, SystemExit):
        return 'what a script does when it is run belongs under if __name__ == "__main__":'
    return ""


# ---------------------------------------------------------------------------------------------------- the class


def choose(namespace: ModuleType, wanted: str | None, file: Path) -> tuple[Callable[..., Any], str]:
    """The class (or the function that makes a module) to instantiate, and why, where that was not asked for."""
    from torch import nn

    classes = {
        name: value
        for name, value in vars(namespace).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == namespace.__name__
    }
    if wanted is not None:
        named = getattr(namespace, wanted, None)
        if (isinstance(named, type) and issubclass(named, nn.Module)) or isinstance(named, FunctionType):
            return named, ""
        what = "is no nn.Module, nor a function that makes one" if named is not None else "is not defined there"
        hint = did_you_mean(wanted, list(classes)) or _listed("its modules are", classes)
        raise ZooError(f"{file}: {wanted} {what}", kind="unknown", hint=hint)
    if not classes:
        raise ZooError(
            f"{file} defines no nn.Module; what it imports does not count",
            kind="file",
            hint=f"define a class in it, or name one that it imports: {file}:CLASS",
        )
    mentioned = _mentions(namespace, classes)
    roots = [name for name in classes if not any(name in mentioned[other] for other in classes if other != name)]
    if len(roots) == 1:
        others = len(classes) - 1
        why = f"{roots[0]} of {file}" + (f": the only one that no other module there uses ({others})" if others else "")
        return classes[roots[0]], why if others else ""
    several = roots or list(classes)
    raise ZooError(
        f"{file} defines {len(several)} modules that could be meant: {', '.join(several)}",
        kind="ambiguous",
        hint=f"name one, as in {file}:{several[-1]}",
    )


def _mentions(namespace: ModuleType, classes: Iterable[str]) -> dict[str, set[str]]:
    """For each class, the names that its definition mentions: its parts, and what it derives from."""
    found: dict[str, set[str]] = {name: set() for name in classes}
    tree = ast.parse(Path(str(namespace.__file__)).read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in found:
            found[node.name] |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found


def _listed(what: str, names: Iterable[str]) -> str:
    every = ", ".join(names)
    return f"{what} {every}" if every else "it defines no nn.Module"


# ---------------------------------------------------------------------------------------------------- its arguments


def arguments(
    make: Callable[..., Any], sets: Sequence[str], config: Mapping[str, Any] | None, file: Path
) -> tuple[dict[str, Any], str]:
    """The keyword arguments for a constructor, and which of them the configuration gave."""
    signature = inspect.signature(make)
    known = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    given: dict[str, Any] = {}
    for text in sets:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ZooError(f'--set takes NAME=VALUE, and got "{text}"', hint="as in --set hidden=384")
        if name not in known and not open_ended:
            near = did_you_mean(name, list(known))
            hint = near or _listed("its arguments are", known)
            raise ZooError(f"{make.__name__} in {file} has no argument {name}", hint=hint)
        given[name] = _literal(value.strip())
    taken = {}
    if config is not None:
        taken = {name: found for name, found in _from(config, known).items() if name not in given}
        given |= {name: found.value for name, found in taken.items()}
    missing = [name for name, parameter in known.items() if parameter.default is _NONE and name not in given]
    if missing:
        raise _unset(make, missing, config, file)
    told = ", ".join(
        f"{name}={found.value!r}" + (f" ({found.key})" * (found.key != name)) for name, found in taken.items()
    )
    if config is not None and not taken:
        told = "nothing: config.json has none of its arguments"
    return given, f"--fit took {told}" if told else ""


def _from(config: Mapping[str, Any], known: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The arguments that a configuration has, and that are of the kind of their default."""
    found = {}
    for name, parameter in known.items():
        taken = from_config(name, config)
        if taken is None:
            continue
        default = parameter.default
        numbers = isinstance(default, (int, float)) and isinstance(taken.value, (int, float))
        if default is _NONE or default is None or numbers or isinstance(taken.value, type(default)):
            found[name] = taken
    return found


def _unset(make: Callable[..., Any], missing: list[str], config: Mapping[str, Any] | None, file: Path) -> ZooError:
    wanted = f"{'needs' if len(missing) > 1 else 'needs the argument'} {', '.join(missing)}"
    hint = " ".join(f"--set {name}=..." for name in missing)
    if config is None:
        hint += "; or --fit, which takes what it can from the checkpoint's config.json"
        return ZooError(f"{make.__name__} in {file} {wanted}", hint=hint)
    return ZooError(f"{make.__name__} in {file} {wanted}, and config.json does not say", hint=hint)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)  # a bare word is itself


# ---------------------------------------------------------------------------------------------------- its example


def example_of(target: Target, asked: str | None) -> Any:
    """What example() of the file gives, or else a method of that name that the class has; or "FILE:FUNC" if that was
    asked for. None where there is no example."""
    file, namespace, name = target.file, target.namespace, "example"
    if asked is not None:
        path, colon, function = asked.rpartition(":")
        if not colon or not function.isidentifier():
            raise ZooError(f'--example takes FILE:FUNC, and got "{asked}"', hint=f"as in {file}:example")
        file, _ = split(path)
        namespace = target.namespace if file.resolve() == target.file.resolve() else run_file(file)
        name = function
    found = getattr(namespace, name, None)
    if found is None:
        if asked is None and callable(getattr(type(target.model), name, None)):
            with at_home(file), said(f"{target.name}.{name}() raised", file):
                return checked_example(getattr(target.model, name)(), f"{file}: {target.name}.{name}()")
        if asked is None:
            return None
        functions = [key for key, value in vars(namespace).items() if isinstance(value, FunctionType)]
        hint = did_you_mean(name, functions) or f"add it: def {name}(): return ... inputs that forward takes"
        raise ZooError(f"{file} defines no {name}", kind="unknown", hint=hint)
    if not callable(found):
        raise ZooError(f"{file}: {name} is no function", kind="file", hint=f"write it as def {name}(): return ...")
    with at_home(file), said(f"{name}() raised", file):
        answer = found()
    return checked_example(answer, f"{file}: {name}()")


def checked_example(answer: Any, where: str) -> Any:
    """An example: a tensor, a tuple of forward's arguments, or a dict of them by name."""
    import torch

    if isinstance(answer, list):
        answer = tuple(answer)
    if not isinstance(answer, (torch.Tensor, tuple, dict)) or (isinstance(answer, (tuple, dict)) and not answer):
        raise ZooError(
            f"{where} gave {type(answer).__name__}, and not inputs for forward",
            kind="file",
            hint="return a tensor, a tuple of forward's arguments, or a dict of them by name",
        )
    return answer
