"""The shape of the module: floors, sizes and the few things that no floor may do.

Each rule is a pure function from a `Source` to its violations. `RULES` lists them all; each is run
on the module itself, and each must catch the bad sources of `BAD` (a rule that cannot fail is worthless).
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import pytest

MODULE: Final = Path(__file__).parents[1] / "openrouter_responses_pipe" / "openrouter_responses_pipe.py"

MAX_LINES: Final = 12_000
MAX_BYTES: Final = 560_000
MAX_FUNCTION_LINES: Final = 60
MAX_CLASS_LINES: Final = 600
MAX_NESTED_FUNCTION_LINES: Final = 15
MAX_NESTING: Final = 4
MAX_PARAMETERS: Final = 8
BUDGET_FACTOR: Final = 1.5
RULE_COLUMN: Final = 79
PURE_FLOORS: Final = (9, 10, 11)


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


class FloorRow(NamedTuple):
    """One row of the floor table: its title, the floors it may name, its line budget."""

    title: str
    may_name: frozenset[int]
    lines: int


def _row(title: str, below: int, lines: int, *also: int) -> FloorRow:
    return FloorRow(title, frozenset((*range(1, below + 1), *also)), lines)


FLOORS: Final[dict[int, FloorRow]] = {
    1: _row("Imports & constants", 0, 260),
    2: _row("Typed shapes", 1, 480),
    3: _row("Errors & templates", 2, 280),
    4: _row("Security & helpers", 3, 450),
    5: _row("Session logging", 2, 260),
    6: _row("Valves", 4, 900),
    7: _row("Host seam", 6, 380),
    8: _row("Model registry", 7, 560),
    9: _row("Request models", 4, 950),
    10: _row("SSE decoder", 3, 150),
    11: _row("Event reducer", 3, 650),
    12: _row("HTTP client", 6, 380),
    13: _row("Emitters & outlet", 6, 650, 11),
    14: _row("Media intake", 7, 450),
    15: _row("Artifact store", 7, 720),
    16: _row("Ledger & metrics", 7, 400, 15),
    17: _row("Tool orchestrator", 7, 560),
    18: _row("Streaming engine", 12, 450),
    19: _row("Context keeper", 18, 320),
    20: _row("Media makers", 18, 350),
    21: _row("Turn loop", 20, 550),
    22: _row("Runtime", 21, 560),
    23: _row("Service functions", 12, 180),
    24: _row("Pipe", 22, 300),
}
FRONT_MATTER_LINES: Final = 60

# The nine places where an error of any kind may be caught; each logs or raises again.
# "" = that part of the work has not come yet.
BROAD_EXCEPT: Final[dict[str, str]] = {
    "request worker": "Runtime._request_worker_loop",
    "tool call": "ToolOrchestrator._call",
    "emitter send": "_SafeEmitter.__call__",
    "background service": "ModelPublisher._catch_up",
    "log sink": "SessionLogger._write",
    "runtime close": "Runtime._close",
    "host call": "_host_answer",
    "service task": "_keep_house",
    "Pipe.pipes": "Pipe.pipes",
}

# What a top-level assignment may call: things that only make a value.
VALUE_MAKERS: Final = words(
    """
    re.compile frozenset set dict list tuple range sorted min max len str int float bytes object zip enumerate
    MappingProxyType types.MappingProxyType TypeVar NewType ParamSpec TypeAliasType cast namedtuple
    ContextVar contextvars.ContextVar logging.getLogger struct.Struct timedelta dict.fromkeys str.maketrans
    frozenset.union partial functools.partial operator.attrgetter operator.itemgetter TypeAdapter
    """
)
# … and the methods of constants that only read them.
READING_METHODS: Final = words("items keys values get union copy split")
IMPURE_MODULES: Final = words(
    """
    asyncio time random logging secrets uuid os io sys socket threading subprocess pathlib tempfile
    concurrent aiohttp httpx redis sqlalchemy tenacity
    """
)
IMPURE_NAMES: Final = words("logger LOGGER _LOGGER _logger log open print input")
IMPURE_ATTRIBUTES: Final = words("logger now utcnow today getenv environ")
FRONT_MATTER_KEYS: Final = words(
    """
    title author author_url git_url funding_url version description license required_open_webui_version
    """
)
REWRITTEN_WORDS: Final = ("from utils", "from apps", "from main", "from config")

HOST_IMPORT: Final = "_host"  # what floor 7 imports the host's modules by
BANNER: Final = re.compile(r"^# ── (\d+)([a-z]?)\. (\S.*?) ─+$")
FRONT_KEY: Final = re.compile(r"^\s*([a-z_]+):\s*(.*)\s*$", re.IGNORECASE)  # as the host reads it
IGNORE_COMMENT: Final = re.compile(r"#\s*(?:type|pyright):\s*ignore(\[[\w, -]+\])?(.*)$")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS: Final = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BLOCKS: Final = (
    ast.With,
    ast.AsyncWith,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.If,
    ast.Try,
    ast.TryStar,
    ast.Match,
)


class Violation(NamedTuple):
    """One thing that is wrong, and where."""

    line: int
    message: str


class Floor(NamedTuple):
    """One banner: floor number, letter of a split floor, title, first and last line."""

    number: int
    letter: str
    title: str
    start: int
    end: int

    @property
    def label(self) -> str:
        """The floor as people write it: `13` or `13a`."""
        return f"{self.number}{self.letter}"


@dataclass(frozen=True)
class Source:
    """One source text with its syntax tree and its floors."""

    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """The lines, without their ends; line 1 has index 0."""
        return self.text.split("\n")

    @cached_property
    def floors(self) -> list[Floor]:
        """Every well-formed banner in order of appearance."""
        found = [
            (number, match) for number, line in enumerate(self.lines, 1) if (match := BANNER.match(line))
        ]
        ends = [number - 1 for number, _ in found[1:]] + [len(self.lines)]
        return [
            Floor(int(match[1]), match[2], match[3], number, end)
            for (number, match), end in zip(found, ends, strict=True)
        ]

    def floor_index(self, line: int) -> int:
        """The position of the floor that holds a line; -1 = the front matter."""
        return sum(floor.start <= line for floor in self.floors) - 1

    def floor_number(self, line: int) -> int:
        """The number of the floor that holds a line; 0 = the front matter."""
        index = self.floor_index(line)
        return self.floors[index].number if index >= 0 else 0

    @cached_property
    def docstring_lines(self) -> list[str]:
        """The lines of the module docstring, quotes included."""
        first = self.tree.body[0] if self.tree.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.value.value:
            return self.lines[first.lineno - 1 : first.end_lineno]
        return []

    @cached_property
    def functions(self) -> list[tuple[str, FunctionNode]]:
        """Every function with its qualified name, nested ones included."""
        return [(name, node) for name, node, _ in _definitions(self.tree) if isinstance(node, FUNCTIONS)]


def _definitions(
    tree: ast.AST, prefix: str = "", *, nested: bool = False
) -> Iterator[tuple[str, ast.AST, bool]]:
    """Qualified name, node and "stands inside a function" of every def and class."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            name = f"{prefix}{child.name}"
            yield name, child, nested
            yield from _definitions(child, f"{name}.", nested=nested or isinstance(child, FUNCTIONS))
        else:
            yield from _definitions(child, prefix, nested=nested)


def _own_nodes(root: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `root` that belong to it, not to a function or class inside it."""
    for child in ast.iter_child_nodes(root):
        if not isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            yield child
            yield from _own_nodes(child)


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute chain; an unknown base gives `?`."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return "?"


def _docstring_size(node: ast.AST) -> int:
    body = getattr(node, "body", [])
    first = body[0] if body else None
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        return (first.end_lineno or first.lineno) - first.lineno + 1
    return 0


def _size(node: FunctionNode | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


# Names: what a piece of code takes from the module's top level


def _bound_names(nodes: list[ast.AST]) -> set[str]:
    """The names that statements bind in their own scope (nested scopes only by name)."""
    bound: set[str] = set()
    leaving: set[str] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            bound.add(node.name)
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, COMPREHENSIONS):
            waiting += [inner for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)]
            continue
        bound |= _bound_by(node)
        if isinstance(node, ast.Global):
            leaving |= set(node.names)
        waiting += ast.iter_child_nodes(node)
    return bound - leaving


def _bound_by(node: ast.AST) -> set[str]:
    """The names that this one node binds."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return {node.id}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
        return {node.name}
    if isinstance(node, ast.MatchMapping) and node.rest:
        return {node.rest}
    return set()


def _all_arguments(arguments: ast.arguments) -> list[ast.arg]:
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return listed + [extra for extra in (arguments.vararg, arguments.kwarg) if extra]


class _GlobalNames(ast.NodeVisitor):
    """Collects each runtime use of a module-level (or built-in) name; annotations are left out."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int]] = []
        self._scopes: list[tuple[bool, set[str]]] = []  # (is a class body, its names)

    def visit_Name(self, node: ast.Name) -> None:
        for depth, (is_class, names) in enumerate(reversed(self._scopes)):
            if node.id in names and (depth == 0 or not is_class):
                return
        if isinstance(node.ctx, ast.Load) or self._scopes:
            self.found.append((node.id, node.lineno))

    def visit_FunctionDef(self, node: FunctionNode) -> None:
        for outside in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
            if outside is not None:
                self.visit(outside)
        self._inside(False, _all_arguments(node.args), list(node.body))

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - the visitor's own naming

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self._inside(False, _all_arguments(node.args), [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for outside in (*node.decorator_list, *node.bases, *(word.value for word in node.keywords)):
            self.visit(outside)
        self._inside(True, [], list(node.body))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)

    def generic_visit(self, node: ast.AST) -> None:
        if not isinstance(node, COMPREHENSIONS):
            super().generic_visit(node)
            return
        targets = {
            name.id
            for part in node.generators
            for name in ast.walk(part.target)
            if isinstance(name, ast.Name)
        }
        self._scopes.append((False, targets))
        super().generic_visit(node)
        self._scopes.pop()

    def _inside(self, is_class: bool, arguments: list[ast.arg], body: list[ast.AST]) -> None:
        self._scopes.append((is_class, {argument.arg for argument in arguments} | _bound_names(body)))
        for statement in body:
            self.visit(statement)
        self._scopes.pop()


def _top_level_homes(source: Source) -> dict[str, int]:
    """Each name defined at top level and the position of the floor that defines it first."""
    homes: dict[str, int] = {}
    for statement in source.tree.body:
        for name in _bound_names([statement]):
            homes.setdefault(name, source.floor_index(statement.lineno))
    return homes


# Rules: the frame


def rule_floors(source: Source) -> list[Violation]:
    """24 floors, in order, each banner of the one form with its title."""
    wrong: list[Violation] = []
    for number, line in enumerate(source.lines, 1):
        if line.lstrip().startswith("# ──") and not (BANNER.match(line) and len(line) == RULE_COLUMN):
            wrong.append(Violation(number, f"not a banner with a rule to column {RULE_COLUMN}: {line!r}"))
    for floor in source.floors:
        row = FLOORS.get(floor.number)
        if row is None:
            wrong.append(Violation(floor.start, f"there is no floor {floor.label}"))
        elif not floor.letter and floor.title != row.title:
            wrong.append(
                Violation(floor.start, f"floor {floor.label} is called {row.title!r}, not {floor.title!r}")
            )
    order = [(floor.number, floor.letter) for floor in source.floors]
    if order != sorted(set(order)):
        wrong.append(
            Violation(1, f"floors out of order or twice: {[floor.label for floor in source.floors]}")
        )
    missing = sorted(set(FLOORS) - {floor.number for floor in source.floors})
    if missing:
        wrong.append(Violation(1, f"floors without a banner: {missing}"))
    return wrong


def rule_floor_notes(source: Source) -> list[Violation]:
    """Under each banner two comment lines at least, or `# (empty)` on a floor that holds nothing."""
    wrong: list[Violation] = []
    for floor in source.floors:
        notes: list[str] = []
        for line in source.lines[floor.start : floor.end]:
            if not line.startswith("# "):
                break
            notes.append(line)
        empty = "# (empty)" in notes
        code = [node for node in source.tree.body if floor.start < node.lineno <= floor.end]
        if not empty and len(notes) < 2:
            wrong.append(
                Violation(floor.start, f"floor {floor.label} needs two lines of comment, or `# (empty)`")
            )
        if empty and code:
            wrong.append(Violation(code[0].lineno, f"floor {floor.label} says (empty) but holds code"))
        if not empty and not code:
            wrong.append(Violation(floor.start, f"floor {floor.label} holds nothing: say `# (empty)`"))
    return wrong


def rule_floor_map(source: Source) -> list[Violation]:
    """The module docstring lists every floor by number and title."""
    text = "\n".join(source.docstring_lines)
    return [
        Violation(1, f"the floor map has no entry `{floor.label}. {floor.title}`")
        for floor in source.floors
        if not re.search(rf"(?<!\w){floor.label}\. {re.escape(floor.title)}(?!\w)", text)
    ]


def rule_front_matter(source: Source) -> list[Violation]:
    """The host, reading its own way, finds the four keys and no other, least of all `requirements`."""
    if not source.lines or source.lines[0].strip() != '"""':
        return [Violation(1, 'the first line must be """ alone, else the host reads no front matter')]
    wrong: list[Violation] = []
    seen: set[str] = set()
    for number, line in enumerate(source.lines[1:], 2):
        if '"""' in line:
            break
        if match := FRONT_KEY.match(line):
            seen.add(match[1].lower())
            if match[1].lower() not in FRONT_MATTER_KEYS:
                wrong.append(Violation(number, f"the host would read {match[1]!r} as a front matter key"))
    needed = {"title", "version", "description", "required_open_webui_version"}
    return wrong + [Violation(1, f"front matter without {key!r}") for key in sorted(needed - seen)]


def rule_whole_size(source: Source) -> list[Violation]:
    """The file as a whole."""
    lines, size = source.text.count("\n"), len(source.text.encode())
    wrong = [Violation(lines, f"{lines} lines, {MAX_LINES} allowed")] if lines > MAX_LINES else []
    return wrong + ([Violation(lines, f"{size} bytes, {MAX_BYTES} allowed")] if size > MAX_BYTES else [])


def rule_floor_budget(source: Source) -> list[Violation]:
    """No floor over its budget by more than half: then it is split into a and b."""
    first = source.floors[0].start - 1 if source.floors else 0
    sizes = [(1, "the front matter", first, FRONT_MATTER_LINES)]
    for floor in source.floors:
        if floor.number in FLOORS:
            size = floor.end - floor.start + 1
            sizes.append((floor.start, f"floor {floor.label}", size, FLOORS[floor.number].lines))
    return [
        Violation(line, f"{what} has {size} lines; its budget is {budget} and half as much again")
        for line, what, size, budget in sizes
        if size > budget * BUDGET_FACTOR
    ]


def rule_rewritten_words(source: Source) -> list[Violation]:
    """The words that the host rewrites anywhere in the text."""
    return [
        Violation(number, f"the host rewrites {words!r}, in prose too")
        for number, line in enumerate(source.lines, 1)
        for words in REWRITTEN_WORDS
        if words in line
    ]


def rule_future_annotations(source: Source) -> list[Violation]:
    """Annotations are never evaluated at import, so they may name higher floors."""
    for node in source.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return []
    return [Violation(1, "`from __future__ import annotations` is missing")]


# Rules: the order of floors


def rule_floor_order(source: Source) -> list[Violation]:
    """No floor uses a name of a higher floor, nor of a lower one that it may not name."""
    homes = _top_level_homes(source)
    names = _GlobalNames()
    names.visit(source.tree)
    wrong: list[Violation] = []
    for name, line in names.found:
        if name not in homes:
            continue
        here, home = source.floor_index(line), homes[name]
        if min(here, home) < 0 or here == home:
            continue
        user, owner = source.floors[here], source.floors[home]
        if home > here:
            wrong.append(
                Violation(line, f"back-edge: floor {user.label} uses {name!r} of floor {owner.label}")
            )
        elif user.number != owner.number and owner.number not in FLOORS[user.number].may_name:
            wrong.append(Violation(line, f"floor {user.label} may not name floor {owner.label} ({name!r})"))
    return wrong


def rule_one_home(source: Source) -> list[Violation]:
    """A top-level name is bound on one floor only."""
    homes = _top_level_homes(source)
    return [
        Violation(statement.lineno, f"{name!r} is already defined on another floor")
        for statement in source.tree.body
        for name in sorted(_bound_names([statement]))
        if homes[name] != source.floor_index(statement.lineno)
    ]


def rule_top_level(source: Source) -> list[Violation]:
    """Top level holds definitions only: nothing runs at import that could be noticed outside."""
    own = {node.name for node in source.tree.body if isinstance(node, (*FUNCTIONS, ast.ClassDef))}
    wrong: list[Violation] = []
    for node in source.tree.body:
        wrong += _top_level_statement(source, node, own)
    return wrong


def _top_level_statement(source: Source, node: ast.stmt, own: set[str]) -> list[Violation]:
    floor = source.floor_number(node.lineno)
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return []
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        return [] if future or floor == 1 else [Violation(node.lineno, "imports stand on floor 1")]
    if isinstance(node, ast.Try) and floor == 1:
        return _guarded_import(node)
    if isinstance(node, ast.If) and _dotted(node.test).endswith("TYPE_CHECKING"):
        return []
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return []
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return _value_calls(node, own)
    return [Violation(node.lineno, f"top level may not hold {type(node).__name__}")]


def _guarded_import(node: ast.Try) -> list[Violation]:
    inner = [*node.body, *node.orelse, *node.finalbody]
    inner += [statement for handler in node.handlers for statement in handler.body]
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)
    return [
        Violation(statement.lineno, "a guarded import may hold imports and assignments only")
        for statement in inner
        if not isinstance(statement, allowed)
    ]


def _run_at_once(node: ast.AST) -> Iterator[ast.AST]:
    """What of an expression runs when it is evaluated: all but the bodies of lambdas."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.Lambda) and child is node.body):
            yield from _run_at_once(child)


def _value_calls(node: ast.Assign | ast.AnnAssign, own: set[str]) -> list[Violation]:
    wrong: list[Violation] = []
    for call in _run_at_once(node.value) if node.value else ():
        if not isinstance(call, ast.Call):
            continue
        name = _dotted(call.func)
        owner, _, method = name.partition(".")
        on_literal = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Constant)
        on_constant = owner.isupper() and method in READING_METHODS
        if name not in VALUE_MAKERS and name not in own and not on_literal and not on_constant:
            wrong.append(
                Violation(call.lineno, f"top level calls {name}(): only makers of values may run at import")
            )
    return wrong


# Rules: sizes


def rule_function_length(source: Source) -> list[Violation]:
    """Functions, docstring left out, comments counted."""
    return [
        Violation(node.lineno, f"{name} has {size} lines, {MAX_FUNCTION_LINES} allowed")
        for name, node in source.functions
        if (size := _size(node) - _docstring_size(node)) > MAX_FUNCTION_LINES
    ]


def rule_class_length(source: Source) -> list[Violation]:
    """Classes, `Pipe` among them."""
    return [
        Violation(node.lineno, f"class {name} has {_size(node)} lines, {MAX_CLASS_LINES} allowed")
        for name, node, _ in _definitions(source.tree)
        if isinstance(node, ast.ClassDef) and _size(node) > MAX_CLASS_LINES
    ]


def rule_nesting(source: Source) -> list[Violation]:
    """Blocks inside blocks; a chain of elif is one block, a function starts again at zero."""
    wrong: list[Violation] = []
    for name, node in source.functions:
        depth, line = max((_depth(statement) for statement in node.body), default=(0, node.lineno))
        if depth > MAX_NESTING:
            wrong.append(Violation(line, f"{name} nests {depth} blocks, {MAX_NESTING} allowed"))
    return wrong


def _depth(node: ast.AST, depth: int = 0) -> tuple[int, int]:
    """The deepest block at or below a node and its line."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return depth, node.lineno
    if isinstance(node, BLOCKS):
        depth += 1
    deepest = (depth, getattr(node, "lineno", 0))
    for child in ast.iter_child_nodes(node):
        inner = depth - 1 if _is_elif(node, child) else depth
        deepest = max(deepest, _depth(child, inner), key=lambda found: found[0])
    return deepest


def _is_elif(parent: ast.AST, child: ast.AST) -> bool:
    if not isinstance(parent, ast.If) or not isinstance(child, ast.If):
        return False
    return child in parent.orelse and child.col_offset == parent.col_offset


def rule_parameters(source: Source) -> list[Violation]:
    """Parameters, `self`, `cls` and the host's dunder arguments aside."""
    wrong: list[Violation] = []
    for name, node in source.functions:
        named = [arg.arg for arg in _all_arguments(node.args)]
        counted = [arg for arg in named if arg not in ("self", "cls") and not re.fullmatch(r"__\w+__", arg)]
        if len(counted) > MAX_PARAMETERS:
            wrong.append(
                Violation(node.lineno, f"{name} takes {len(counted)} parameters, {MAX_PARAMETERS} allowed")
            )
    return wrong


def rule_nested_functions(source: Source) -> list[Violation]:
    """A function inside a function stays small."""
    return [
        Violation(node.lineno, f"nested {name} has {size} lines, {MAX_NESTED_FUNCTION_LINES} allowed")
        for name, node, nested in _definitions(source.tree)
        if nested and isinstance(node, FUNCTIONS)
        if (size := _size(node) - _docstring_size(node)) > MAX_NESTED_FUNCTION_LINES
    ]


# Rules: what may not be done


def rule_pure_core(source: Source) -> list[Violation]:
    """Floors 9 to 11: no await, no clock, no chance, no logger, no I/O."""
    impure = IMPURE_NAMES | _names_of_impure_imports(source)
    names = _GlobalNames()
    names.visit(source.tree)
    found = [(line, f"uses {name}") for name, line in names.found if name in impure]
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.stmt, ast.expr)):
            found += [(node.lineno, what) for what in _impurities(node)]
    return [
        Violation(line, f"floor {source.floor_number(line)} is pure: {what}")
        for line, what in found
        if source.floor_number(line) in PURE_FLOORS
    ]


def _names_of_impure_imports(source: Source) -> set[str]:
    """What the file calls the modules that wait, measure, guess or write, and things taken out of them."""
    names: set[str] = set(IMPURE_MODULES)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name for a in node.names if a.name.split(".")[0] in IMPURE_MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in IMPURE_MODULES:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _impurities(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)):
        yield "async code"
    elif isinstance(node, COMPREHENSIONS):
        yield from ("async code" for part in node.generators if part.is_async)
    elif isinstance(node, ast.Attribute) and node.attr in IMPURE_ATTRIBUTES:
        yield f"uses .{node.attr}"
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        for name in names:
            if name.split(".")[0] in IMPURE_MODULES:
                yield f"imports {name}"


def rule_no_pipe_reference(source: Source) -> list[Violation]:
    """Nobody below floor 24 takes, keeps or reaches through a `Pipe`."""
    wrong: list[Violation] = []
    for node in ast.walk(source.tree):
        name = {ast.arg: "arg", ast.Attribute: "attr", ast.keyword: "arg"}.get(type(node))
        if name and getattr(node, name) in ("pipe", "_pipe"):
            line = getattr(node, "lineno", 0)
            if source.floor_number(line) != 24:
                wrong.append(Violation(line, f"{getattr(node, name)!r} outside floor 24"))
    return wrong


def rule_host_imports(source: Source) -> list[Violation]:
    """Only floors 1 and 7 know where the host's modules are."""
    wrong: list[Violation] = []
    for node in ast.walk(source.tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if re.fullmatch(r"open_webui(\.\w+)+", node.value) else []
        elif isinstance(node, ast.Call) and _dotted(node.func).endswith(("import_module", "__import__")):
            names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
        elif isinstance(node, ast.Call) and _dotted(node.func) == HOST_IMPORT:
            names = ["open_webui", *(str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))]
        line = getattr(node, "lineno", 0)
        if source.floor_number(line) not in (1, 7):
            hits = [name for name in names if name.split(".")[0] == "open_webui"]
            wrong += [
                Violation(line, f"{name!r} is the host's: only floors 1 and 7 import it") for name in hits
            ]
    return wrong


def rule_environment(source: Source) -> list[Violation]:
    """Only floor 6 reads the environment."""
    return [
        Violation(node.lineno, f"only floor 6 reads the environment, not floor {floor}")
        for node in ast.walk(source.tree)
        if isinstance(node, (ast.Attribute, ast.Name))
        if _dotted(node).split(".")[-1] in ("environ", "getenv", "environb")
        if (floor := source.floor_number(node.lineno)) != 6
    ]


def rule_no_hidden_state(source: Source) -> list[Violation]:
    """No `getattr(self, …)`, no `nonlocal`, no `__del__`."""
    wrong: list[Violation] = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Nonlocal):
            wrong.append(Violation(node.lineno, "nonlocal: make it a class with an attribute"))
        elif isinstance(node, FUNCTIONS) and node.name == "__del__":
            wrong.append(Violation(node.lineno, "__del__: lifetimes are `async with`"))
        elif isinstance(node, ast.Call) and _dotted(node.func) in ("getattr", "setattr", "hasattr"):
            hits = [target for target in node.args[:1] if _dotted(target) in ("self", "cls")]
            wrong += [Violation(hit.lineno, "getattr(self, …): set it in __init__") for hit in hits]
    return wrong


def rule_private_attributes(source: Source) -> list[Violation]:
    """An underscored attribute is read through `self`, in its class, or in a table of methods beside it."""
    wrong: list[Violation] = []
    classes = {node.name: node for node in source.tree.body if isinstance(node, ast.ClassDef)}
    for statement in source.tree.body:
        mine = _private_members(statement) if isinstance(statement, ast.ClassDef) else set()
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr):
                known = node.attr in mine or node.attr in ("_replace", "_asdict", "_fields", "_make")
                beside = classes.get(_dotted(node.value))
                if beside and source.floor_index(beside.lineno) == source.floor_index(node.lineno):
                    continue
                if _dotted(node.value) not in ("self", "cls") and not known:
                    wrong.append(Violation(node.lineno, f"{_dotted(node)} is private to another class"))
    return wrong


def _private_members(node: ast.ClassDef) -> set[str]:
    names = _bound_names(list(node.body))
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and _dotted(inner.value) in ("self", "cls"):
            names.add(inner.attr)
    return names


def rule_broad_except(source: Source) -> list[Violation]:
    """Errors of any kind are caught in the nine places only, and there they are logged or raised again."""
    allowed = {name for name in BROAD_EXCEPT.values() if name}
    places: list[tuple[str, ast.AST]] = [("<top level>", source.tree), *source.functions]
    classes = [(name, node) for name, node, _ in _definitions(source.tree) if isinstance(node, ast.ClassDef)]
    wrong: list[Violation] = []
    for name, place in places + classes:
        for node in _own_nodes(place):
            line = getattr(node, "lineno", 0)
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
                if name not in allowed:
                    wrong.append(Violation(line, f"broad except in {name}, which is not one of the nine"))
                if not _logs_or_raises(node):
                    wrong.append(Violation(line, f"broad except in {name} neither logs nor raises"))
            elif isinstance(node, ast.Call) and _dotted(node.func).endswith("suppress"):
                wrong += [Violation(line, f"broad suppress in {name}") for arg in node.args if _is_broad(arg)]
    return wrong


def _is_broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(_is_broad(part) for part in kind.elts)
    return kind is None or _dotted(kind).split(".")[-1] in ("Exception", "BaseException")


def _logs_or_raises(handler: ast.ExceptHandler) -> bool:
    for node in (inner for statement in handler.body for inner in ast.walk(statement)):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call) and re.search(
            r"(^|\.)_?(logger|log)(\.|$)|\.handleError$", _dotted(node.func), re.IGNORECASE
        ):
            return True
    return False


def rule_docstrings(source: Source) -> list[Violation]:
    """Every public definition says what it promises."""
    return [
        Violation(node.lineno, f"{name} has no docstring")
        for name, node, nested in _definitions(source.tree)
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
        if not nested and not node.name.startswith("_") and not _is_variant(node)
        if not (ast.get_docstring(node) or "").strip()
    ]


def _is_variant(node: FunctionNode | ast.ClassDef) -> bool:
    """A setter, deleter or overload: the docstring stands on the first form."""
    return any(
        _dotted(item).split(".")[-1] in ("setter", "deleter", "overload") for item in node.decorator_list
    )


def rule_ignores(source: Source) -> list[Violation]:
    """Each silenced type error says which one, and why."""
    wrong: list[Violation] = []
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type != tokenize.COMMENT or not (match := IGNORE_COMMENT.search(token.string)):
            continue
        if not match[1]:
            wrong.append(Violation(token.start[0], f"which error? {token.string}"))
        if len(re.findall(r"\w+", match[2])) < 2:
            wrong.append(Violation(token.start[0], f"why? {token.string}"))
    return wrong


Rule = Callable[[Source], list[Violation]]
RULES: Final[tuple[Rule, ...]] = (
    rule_floors,
    rule_floor_notes,
    rule_floor_map,
    rule_front_matter,
    rule_whole_size,
    rule_floor_budget,
    rule_rewritten_words,
    rule_future_annotations,
    rule_floor_order,
    rule_one_home,
    rule_top_level,
    rule_function_length,
    rule_class_length,
    rule_nesting,
    rule_parameters,
    rule_nested_functions,
    rule_pure_core,
    rule_no_pipe_reference,
    rule_host_imports,
    rule_environment,
    rule_no_hidden_state,
    rule_private_attributes,
    rule_broad_except,
    rule_docstrings,
    rule_ignores,
)


# The rules on the module


@pytest.fixture(scope="module")
def module_source() -> Source:
    return Source(MODULE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_module_keeps(rule: Rule, module_source: Source) -> None:
    wrong = sorted(set(rule(module_source)))
    report = "\n".join(f"{MODULE.name}:{line}: {message}" for line, message in wrong)
    assert not wrong, f"{len(wrong)} × {(rule.__doc__ or '').splitlines()[0]}\n{report}"


def test_broad_except_table_is_true(module_source: Source) -> None:
    assert len(BROAD_EXCEPT) <= 9
    known = {name for name, _ in module_source.functions}
    gone = [name for name in BROAD_EXCEPT.values() if name and name not in known]
    assert not gone, f"BROAD_EXCEPT names functions that do not exist: {gone}"


# The rules on small sources: a good one passes, each bad one is caught


def build(floors: dict[int, str] | None = None, front: str = "") -> Source:
    """A whole small module: all banners, the given code on the given floors."""
    code = {1: "import asyncio\nimport os\nimport time"} | (floors or {})
    head = ["title: T", "version: 1", "description: D", "required_open_webui_version: 0.11.2"]
    parts = ['"""', *head, front, *(f"{number:>2}. {row.title}" for number, row in FLOORS.items()), '"""']
    parts.append("from __future__ import annotations")
    for number, row in FLOORS.items():
        start = f"# ── {number}. {row.title} "
        notes = ["# What it holds.", "# What it promises."] if number in code else ["# (empty)"]
        parts += [start + "─" * (RULE_COLUMN - len(start)), *notes, "", code.get(number, ""), ""]
    return Source("\n".join(parts))


def many(count: int, line: str = "    x = 1") -> str:
    return "\n".join([line] * count)


GOOD: Final = {
    1: """import asyncio
import re
import os
try:
    import lz4
except ImportError:
    lz4 = None
_A = re.compile("a")
""",
    2: """class Shape:
    'A shape.'
    other: Pipe

    def _same(self, o: Shape) -> bool:
        return o._x == self._x
""",
    4: """def _low(Pipe: int) -> int:
    return sum(_high for _high in range(Pipe))
""",
    6: """def _secret() -> str:
    return os.environ["A"]
""",
    9: """def _pure(time: float) -> Shape:
    return Shape(_low(int(time)))
""",
    11: """def _a() -> int:
    return _b()

def _b() -> int:
    return 1
""",
    18: """async def _high(a: int, __user__: int, __b__: int) -> None:
    await asyncio.sleep(a)  # type: ignore[misc]  # the stub is wrong
""",
    24: """class Pipe:
    'The pipe.'
    async def pipe(self) -> None:
        'Run.'
        self.pipe = _high
""",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_good_source(rule: Rule) -> None:
    assert rule(build(GOOD)) == []


class Bad(NamedTuple):
    """A source that a rule must refuse, and a piece of what it must say."""

    rule: Rule
    source: Source
    says: str


def _swap(source: Source, old: str, new: str) -> Source:
    assert old in source.text
    return Source(source.text.replace(old, new))


def bad(rule: Rule, says: str, *, front: str = "", **floors: str) -> Bad:
    """A small module with code on some floors: `f9="A = 1"` puts it on floor 9."""
    return Bad(rule, build({int(name[1:]): code for name, code in floors.items()}, front), says)


def bad_banner(says: str, new: str) -> Bad:
    """A small module with another banner for floor 5."""
    return Bad(rule_floors, _swap(build(), "# ── 5. Session logging ──", new), says)


def _handler(kind: str, body: str) -> str:
    return f"def _a():\n    try:\n        _x()\n    except {kind}:\n        {body}"


_DEEP_WORDS = ["for a in b:", "while a:", "with a:", "if a:"]
_DEEP_OK = "\n".join("    " * (n + 1) + word for n, word in enumerate(_DEEP_WORDS))
_DEEP = f"{_DEEP_OK}\n{'    ' * 5}try:\n{'    ' * 6}pass\n{'    ' * 5}finally:\n{'    ' * 6}pass"
_LONG_METHOD = f"class _A:\n    def b(self):\n        pass\n{many(59, '        # why')}\n        pass"
_CLASS_NAME = "class A:\n    B = 1\n    def m(self):\n        return B"
_GETATTR = "class A:\n    def b(self):\n        return getattr(self, '_x', None)"

BAD: Final[tuple[Bad, ...]] = (
    bad_banner("column 79", "# ── 5. Session logging ─"),
    bad_banner("'Session logging'", "# ── 5. Session Logging ──"),
    bad_banner("without a banner: [5]", "#  5. Session logging ──"),
    bad_banner("out of order", "# ── 15. Session logging ─"),
    bad_banner("no floor 25", "# ── 25. Session logging ─"),
    Bad(rule_floor_notes, _swap(build({2: "A = 1"}), "# What it promises.", ""), "two lines of comment"),
    bad(rule_floor_notes, "holds nothing", f2=""),
    Bad(rule_floor_notes, _swap(build({2: "A = 1"}), "# What it promises.", "# (empty)"), "holds code"),
    Bad(rule_floor_map, _swap(build(), " 7. Host seam\n", ""), "7. Host seam"),
    bad(rule_front_matter, "requirements", front="requirements: lz4"),
    bad(rule_front_matter, "'Note'", front="Note: a line"),
    Bad(rule_front_matter, _swap(build(), "version: 1", "version 1"), "without 'version'"),
    Bad(rule_front_matter, Source('"""title: x"""'), "first line"),
    bad(rule_whole_size, "lines", f2=many(MAX_LINES, "A = 1")),
    bad(rule_whole_size, "bytes", f2=f"A = '{'x' * MAX_BYTES}'"),
    bad(rule_floor_budget, "floor 10", f10=many(225, "A = 1")),
    bad(rule_floor_budget, "front matter", front="\n" * 90),
    bad(rule_rewritten_words, "from main", f3="# far from maintained"),
    bad(rule_rewritten_words, "from utils", f3="A = 'from utils'"),
    Bad(rule_future_annotations, _swap(build(), "from __future__ import annotations", ""), "missing"),
    bad(rule_floor_order, "back-edge", f4="def _a():\n    return _b()", f9="def _b():\n    pass"),
    bad(rule_floor_order, "back-edge", f4="class A(B):\n    pass", f9="class B:\n    pass"),
    bad(rule_floor_order, "uses 'B' of floor 9", f4="def _a(x=B):\n    pass", f9="B = 1"),
    bad(rule_floor_order, "back-edge", f4="_A = lambda: [B for _ in ()]", f9="B = 1"),
    bad(rule_floor_order, "back-edge", f4=_CLASS_NAME, f9="B = 1"),
    bad(rule_floor_order, "may not name floor 4", f5="def _a():\n    return B", f4="B = 1"),
    bad(rule_floor_order, "may not name floor 13", f23="def _a():\n    return B", f13="B = 1"),
    bad(rule_floor_order, "back-edge", f4="def _a():\n    global B\n    B = 2", f9="B = 1"),
    bad(rule_one_home, "'A' is already", f4="A = 1", f9="A = 2"),
    bad(rule_top_level, "Expr", f1="import requests\nrequests.get('http://x')"),
    bad(rule_top_level, "requests.get()", f1="import requests\nA = requests.get('http://x')"),
    bad(rule_top_level, "floor 1", f4="import json"),
    bad(rule_top_level, "For", f4="for a in ():\n    pass"),
    bad(rule_top_level, "guarded import", f1="try:\n    start()\nexcept ImportError:\n    pass"),
    bad(rule_function_length, "_a has 61 lines", f4=f"def _a():\n{many(60)}"),
    bad(rule_function_length, "_A.b", f4=_LONG_METHOD),
    bad(rule_class_length, "601 lines", f4=f"class _A:\n{many(600)}"),
    bad(rule_nesting, "nests 5", f4=f"def _a(a, b):\n{_DEEP}"),
    bad(rule_parameters, "9 parameters", f4="def _a(a, b, c, d, e, f, g, h, *i):\n    pass"),
    bad(rule_nested_functions, "nested _a.b", f4=f"def _a():\n    def b():\n{many(15, '        x = 1')}"),
    bad(rule_pure_core, "async code", f10="async def _a():\n    pass"),
    bad(rule_pure_core, "uses time", f11="def _a():\n    return time.time()"),
    bad(rule_pure_core, "uses rnd", f1="import random as rnd", f9="def _a():\n    return rnd.random()"),
    bad(
        rule_pure_core, "uses now_s", f1="from time import time as now_s", f9="def _a():\n    return now_s()"
    ),
    bad(rule_pure_core, "imports random", f9="def _a():\n    import random"),
    bad(rule_pure_core, ".logger", f9="def _a(x):\n    x.logger.info('a')"),
    bad(rule_no_pipe_reference, "'pipe' outside", f18="def _a(pipe):\n    pass"),
    bad(rule_no_pipe_reference, "'_pipe' outside", f18="def _a(x):\n    return x._pipe"),
    bad(rule_no_pipe_reference, "'pipe' outside", f22="def _a(x):\n    return x(pipe=1)"),
    bad(rule_host_imports, "floors 1 and 7", f8="def _a():\n    import open_webui.env"),
    bad(rule_host_imports, "floors 1 and 7", f8="def _a():\n    from open_webui import env"),
    bad(rule_host_imports, "open_webui.models.users", f8="_A = ('open_webui.models.users',)"),
    bad(rule_host_imports, "floors 1 and 7", f8="def _a():\n    return _host('env', 'VERSION')"),
    bad(rule_host_imports, "'open_webui'", f8="def _a():\n    return import_module('open_webui')"),
    bad(rule_environment, "floor 8", f8="def _a():\n    return os.environ['A']"),
    bad(rule_environment, "floor 8", f8="def _a():\n    return os.getenv('A')"),
    bad(rule_no_hidden_state, "getattr", f8=_GETATTR),
    bad(rule_no_hidden_state, "nonlocal", f8="def _a():\n    x = 1\n    def b():\n        nonlocal x"),
    bad(rule_no_hidden_state, "__del__", f8="class A:\n    def __del__(self):\n        pass"),
    bad(rule_private_attributes, "x._y", f8="def _a(x):\n    return x._y"),
    bad(rule_private_attributes, "self.c._d", f8="class A:\n    def b(self):\n        return self.c._d"),
    bad(rule_private_attributes, "A._b", f7="class A:\n    def _b(self):\n        pass", f8="_T = (A._b,)"),
    bad(rule_broad_except, "one of the nine", f8=_handler("Exception", "raise")),
    bad(rule_broad_except, "one of the nine", f8=_handler("(OSError, BaseException)", "raise")),
    bad(rule_broad_except, "neither logs", f8=_handler("", "pass")),
    bad(rule_broad_except, "broad suppress", f8="def _a():\n    with suppress(Exception):\n        pass"),
    bad(rule_broad_except, "<top level>", f1="try:\n    import a\nexcept Exception:\n    a = None"),
    bad(rule_docstrings, "A.b has no", f8="class A:\n    'A.'\n    def b(self):\n        pass"),
    bad(rule_docstrings, "a has no", f8="def a():\n    pass"),
    bad(rule_ignores, "which error?", f8="A = 1  # type: ignore"),
    bad(rule_ignores, "why?", f8="A = 1  # pyright: ignore[reportFoo]"),
)


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case.rule.__name__}: {case.says}")
def test_rule_catches(case: Bad) -> None:
    said = [message for _, message in case.rule(case.source)]
    assert any(case.says in message for message in said), f"{case.rule.__name__} said only {said}"


def test_every_rule_has_a_bad_source() -> None:
    assert {case.rule for case in BAD} == set(RULES)


def test_limits_are_exact() -> None:
    """What is exactly at a limit passes."""
    sixty = build({4: f'def _a():\n    """D.\n\n    E.\n    """\n{many(59)}'})
    assert rule_function_length(sixty) == []
    assert rule_class_length(build({4: f"class _A:\n{many(599)}"})) == []
    assert rule_nesting(build({4: f"def _a(a, b):\n{_DEEP_OK}\n{'    ' * 5}pass"})) == []
    chain = "def _a(a):\n    if a:\n        pass\n" + many(9, "    elif a:\n        pass")
    assert rule_nesting(build({4: chain})) == []
    assert rule_parameters(build({4: "def _a(self, a, b, c, d, e, f, g, h, __user__):\n    pass"})) == []
    assert rule_floor_budget(build({10: many(220, "A = 1")})) == []


def test_a_split_floor_is_two_floors() -> None:
    source = build({13: "A = 1"})
    title = "# ── 13. Emitters & outlet "
    halves = [f"# ── 13{letter}. {name} " for letter, name in (("a", "Emitters"), ("b", "Outlet"))]
    old = title + "─" * (RULE_COLUMN - len(title)) + "\n# What it holds.\n# What it promises.\n\nA = 1"
    first, second = (half + "─" * (RULE_COLUMN - len(half)) + "\n# a\n# b\n" for half in halves)
    split = _swap(source, old, f"{first}\nA = 1\n\n{second}\n_B = A\n")
    assert rule_floors(split) == []
    assert rule_floor_order(split) == []
    upside_down = _swap(source, old, f"{first}\n_B = A\n\n{second}\nA = 1\n")
    assert rule_floor_order(upside_down) == [
        Violation(upside_down.lines.index("_B = A") + 1, "back-edge: floor 13a uses 'A' of floor 13b")
    ]
