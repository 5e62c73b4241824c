r"""Which layers of a model are quantized, and how: patterns over layers' names to options.

A recipe comes from Python, or from a TOML or JSON file, checked against ``recipe.schema.json`` beside this module::

    format = "compressed-tensors"

    [defaults]
    bits = 4
    group_size = 128

    [[rules]]
    pattern = "*.down_proj"             # a glob over the whole dotted name; * crosses dots
    bits = 8                            # all else as in defaults

    [[rules]]
    pattern = 're:.*\.layers\.[01]\..*'  # a regular expression for the whole name
    skip = true

For each layer the first rule that matches counts, and no other. A pattern that matches no layer is an error, and so is
a rule that leaves nothing to do because earlier ones take every layer that it matches (:meth:`Recipe.check`).
"""

import difflib
import fnmatch
import functools
import json
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from miniquant.grid import SuperblockKind
from miniquant.presets import Preset, preset
from miniquant.superblocks import GRIDS, GroupGrid
from miniquant.token_weights import TokenWeights

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator, ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Unseen = Literal["error", "siblings", "rtn"]
FormatName = Literal["compressed-tensors", "gptq", "gptq_v2", "gguf", "miniquant"]

SCHEMA = Path(__file__).with_name("recipe.schema.json")
_REGULAR_EXPRESSION = "re:"
_MOST_ERRORS = 10
# What the preset that does the most corrects: a whole correction fits calibration tokens too closely.
CORRECTION_OF_BEST = 0.5
STREAM_CORRECTION_OF_BEST = 0.4
_OF_GRID = GroupGrid._fields  # options that superblocks take the place of
_FRACTIONS = ("ridge", "correction", "stream_correction")  # options that are numbers, but no integers


@dataclass(frozen=True)
class LayerOptions:
    """What is done to one layer.

    Attributes:
        bits: of a code, 2 to 8.
        group_size: columns per scale; -1 is one group per row.
        symmetric: which of the two grids (see the package).
        superblocks: a type of GGUF with two levels of scales (:mod:`miniquant.superblocks`), in place of ``bits``,
            ``group_size`` and ``symmetric``, which then have their defaults and are not read.
        preset: of :func:`miniquant.preset`.
        ridge: relative to the Hessian's mean diagonal; "auto" finds it in the tokens (:func:`miniquant.gptq_auto`).
        token_weights: how much each token counts in the Hessian (:mod:`miniquant.token_weights`): "uniform": alike;
            "norm": by 1 / |x|^2 of its input x; "position": the first of a causal sequence of T tokens
            1 + (T - 1) / 4 times; or both; "gradient": both, and by what the model's predictions depend on, which takes
            a backward pass of a language model.
        correction: which part of the errors that the quantized layers before leave in its inputs the layer makes up
            for (:mod:`miniquant.correction`), 0 to 1; above 0 it takes a second forward pass. None is that of the
            preset: 0.5 with "best", 0 with the others (:attr:`corrected_part`).
        stream_correction: the same of the errors of the residual stream that the layer writes to, where it writes to
            one. None is 0.4 with the preset "best" where inputs are corrected, too, and 0 otherwise
            (:attr:`corrected_stream`). Where it is above 0, weights of tokens by norm are by that of the stream.
        unseen: what happens to a layer that saw fewer tokens than :meth:`tokens_needed`: "error" stops the run,
            "siblings" takes the Hessian of all tokens of the layer's siblings, "rtn" rounds to nearest.
        min_tokens: how many tokens the layer must see; None is the rule of :meth:`tokens_needed`.
        skip: whether the layer stays as it is.

    Raises:
        ValueError: for a bad option.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    superblocks: SuperblockKind | None = None
    preset: Preset = "best"
    ridge: float | Literal["auto"] = "auto"
    token_weights: TokenWeights = "norm+position"  # noqa: S105  (no password)
    correction: float | None = None
    stream_correction: float | None = None
    unseen: Unseen = "error"
    min_tokens: int | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        _raise_first("LayerOptions", _errors(vars(self), "options"))
        for name, value in _normalized({name: getattr(self, name) for name in _FRACTIONS}).items():
            object.__setattr__(self, name, value)
        if self.superblocks is not None:
            for name in _OF_GRID:
                object.__setattr__(self, name, getattr(type(self), name))

    def tokens_needed(self, columns: int) -> int:
        """How many tokens a layer of so many columns must see to be quantized with a Hessian of its own.

        Without ``min_tokens`` an eighth of the columns, but at least 16. With as few, a ridge from the data is still
        well ahead of rounding to nearest on held-out tokens: docs/quality.md, "Few calibration tokens".
        """
        return max(16, -(-columns // 8)) if self.min_tokens is None else self.min_tokens

    @property
    def corrected_part(self) -> float:
        """The correction, where that is the preset's, too."""
        if self.correction is None:
            return CORRECTION_OF_BEST if self.preset == "best" else 0.0
        return self.correction

    @property
    def corrected_stream(self) -> float:
        """The correction of the stream, where that is the preset's, too."""
        if self.stream_correction is None:
            return STREAM_CORRECTION_OF_BEST if self.preset == "best" and self.corrected_part else 0.0
        return self.stream_correction

    @property
    def grid(self) -> GroupGrid:
        """Bits, group size and whether the grid is symmetric, those of ``superblocks`` where it is stated."""
        if self.superblocks is not None:
            return GRIDS[self.superblocks]
        return GroupGrid(self.bits, self.group_size, self.symmetric)

    @property
    def full_range(self) -> bool:
        """Whether the grid is the symmetric one with one code more, as the preset or ``superblocks`` sets it."""
        if self.superblocks is not None:
            return self.grid.symmetric
        return bool(preset(self.preset, symmetric=self.symmetric).get("full_range", False))

    def arguments(self, scale_dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Keyword arguments: of :func:`miniquant.gptq_auto` where the ridge is "auto", else of :func:`miniquant.gptq`.

        With ``superblocks`` they are of :func:`miniquant.gptq_superblocks`.

        Args:
            scale_dtype: the dtype in which scales will be stored; None is the weight's. Superblocks have their own.

        Example:
            >>> quantized = gptq_auto(weight, accumulator, **options.arguments(torch.float16))
        """
        ridge = {} if self.ridge == "auto" else {"ridge": self.ridge}
        if self.superblocks is not None:
            return {**ridge, **preset(self.preset, kind=self.superblocks)}
        return {
            **self.grid._asdict(),
            "scale_dtype": scale_dtype,
            **ridge,
            **preset(self.preset, symmetric=self.symmetric),
        }

    def with_stated(self, stated: Mapping[str, Any]) -> "LayerOptions":
        """The same with options that somebody states: bits, group_size or symmetric take the place of superblocks.

        Raises:
            ValueError: for a bad option, or one of these beside superblocks.
        """
        _raise_first("LayerOptions", _two_grids(stated))
        other_grid = {"superblocks": None} if any(option in stated for option in _OF_GRID) else {}
        return replace(self, **{**other_grid, **stated})

    def to_dict(self) -> dict[str, Any]:
        """All options, as JSON can hold them; without those that superblocks take the place of."""
        left_out = () if self.superblocks is None else _OF_GRID
        return {option.name: getattr(self, option.name) for option in fields(self) if option.name not in left_out}


@dataclass(frozen=True, init=False)
class Rule:
    r"""Options for the layers whose name a pattern matches.

    Attributes:
        pattern: a glob over the whole dotted name, as in :mod:`fnmatch`: ``*`` is any text, dots included, ``?`` one
            character, ``[ab]`` one of several; or ``re:`` and a regular expression (:mod:`re`) for the whole name. Case
            counts.
        options: those of :class:`LayerOptions` that the rule states; the others are the recipe's defaults. A whole
            :class:`LayerOptions` states them all.

    Raises:
        ValueError: for a bad pattern or option.

    Example:
        >>> Rule("model.layers.0.*", {"bits": 8})
        >>> Rule(r"re:.*\.experts\.\d+\..*", {"unseen": "siblings"})
    """

    pattern: str
    options: Mapping[str, Any]

    def __init__(self, pattern: str, options: Mapping[str, Any] | LayerOptions | None = None) -> None:
        stated = options.to_dict() if isinstance(options, LayerOptions) else {} if options is None else options
        if not isinstance(stated, Mapping):
            raise ValueError(  # noqa: TRY004  (as for what a file states)
                f"Rule: expected options to be LayerOptions or a mapping, but got {stated!r}"
            )
        if "pattern" in stated:
            raise ValueError("Rule: expected the names of options, but got 'pattern' among them")
        _raise_first("Rule", _errors({"pattern": pattern, **stated}, "rule"))
        _raise_first("Rule", _two_grids(stated))
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "options", _normalized(stated))
        _ = self._matches  # a pattern that is none says so now

    @functools.cached_property
    def _matches(self) -> Callable[[str], Any]:
        expression = self.pattern.removeprefix(_REGULAR_EXPRESSION)
        if expression == self.pattern:
            return re.compile(fnmatch.translate(self.pattern)).fullmatch
        try:
            return re.compile(expression).fullmatch
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"Rule: expected pattern to be re: and a regular expression, but got {reprlib.repr(self.pattern)}: "
                f"{error}"
            ) from error

    def matches(self, name: str) -> bool:
        """Whether the pattern matches a layer's whole name."""
        return self._matches(name) is not None

    def to_dict(self) -> dict[str, Any]:
        """Pattern and options, as JSON can hold them."""
        return {"pattern": self.pattern, **self.options}


@dataclass(frozen=True)
class Recipe:
    """What is done to the layers of a model.

    Attributes:
        defaults: for layers that no rule matches, and where a rule leaves an option out.
        rules: for each layer the first that matches counts. One that states bits, group_size or symmetric takes its
            layers out of the defaults' superblocks.
        format: of the checkpoint; None: what the caller says.
        rotation: whether the model is turned first (:mod:`miniquant.rotation`), which changes none of its predictions
            and all of its weights.

    Raises:
        ValueError: for a bad part.

    Example:
        >>> recipe = Recipe(LayerOptions(bits=3), [Rule("*.down_proj", {"bits": 4}), Rule("*.0.*", {"skip": True})])
        >>> recipe.options("model.layers.7.mlp.down_proj").bits
        4
    """

    defaults: LayerOptions = field(default_factory=LayerOptions)
    rules: Sequence[Rule] = ()
    format: FormatName | None = None
    rotation: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.defaults, LayerOptions):
            raise ValueError(  # noqa: TRY004  (as for what a file states)
                f"Recipe: expected defaults to be LayerOptions (from_dict takes a dict), but got {self.defaults!r}"
            )
        object.__setattr__(self, "rules", tuple(self.rules))
        for number, rule in enumerate(self.rules, start=1):
            if not isinstance(rule, Rule):
                raise ValueError(  # noqa: TRY004
                    f"Recipe: rule {number}: expected a Rule (from_dict takes dicts), but got {rule!r}"
                )
        _raise_first("Recipe", _errors({"format": self.format, "rotation": self.rotation}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Reads a recipe from a file.

        Args:
            path: of a file whose name ends in ``.toml`` or ``.json``, in UTF-8.

        Raises:
            OSError: where the file cannot be read.
            ValueError: where it is no recipe; the message names the file, the rule, the key and what was expected.
        """
        path = Path(path)
        where = f"Recipe.load: {path}"
        parsers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": _parse_json}
        if path.suffix.lower() not in parsers:
            raise ValueError(f"{where}: expected a file whose name ends in .toml or .json, but got {path.name!r}")
        kind = path.suffix.lower()[1:].upper()
        content = path.read_bytes()
        try:
            document = parsers[path.suffix.lower()](content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: expected text in UTF-8, but got byte 0x{content[error.start]:02x} at offset {error.start}"
            ) from error
        except RecursionError as error:
            raise ValueError(f"{where}: expected a recipe, but got {kind} that is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"{where}: expected {kind}, but got: {error}") from error
        return cls._from_document(document, where)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Recipe":
        """A recipe from what a file of it holds, or from what :meth:`to_dict` gave.

        Raises:
            ValueError: where it is no recipe; the message names the rule, the key and what was expected.
        """
        return cls._from_document(document, "Recipe.from_dict")

    @classmethod
    def _from_document(cls, document: Any, where: str) -> "Recipe":
        _raise_all(where, _errors(document))
        rules = []
        for number, stated in enumerate(document.get("rules", ()), start=1):
            options = dict(stated)
            try:
                rules.append(Rule(options.pop("pattern"), options))
            except ValueError as error:
                raise ValueError(f"{where}: rule {number}: {str(error).removeprefix('Rule: ')}") from error
        try:
            defaults = LayerOptions().with_stated(document.get("defaults", {}))
        except ValueError as error:
            raise ValueError(f"{where}: defaults: {str(error).removeprefix('LayerOptions: ')}") from error
        return cls(defaults, rules, document.get("format"), document.get("rotation", False))

    def to_dict(self) -> dict[str, Any]:
        """The whole recipe, as JSON can hold it; :meth:`from_dict` gives an equal one."""
        return {
            "format": self.format,
            "rotation": self.rotation,
            "defaults": self.defaults.to_dict(),
            "rules": [rule.to_dict() for rule in self.rules],
        }

    def rule(self, name: str) -> Rule | None:
        """The rule that counts for a layer; None where no rule matches its name."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def options(self, name: str) -> LayerOptions:
        """What is done to a layer."""
        rule = self.rule(name)
        return self.defaults if rule is None else self.defaults.with_stated(rule.options)

    def check(self, names: Iterable[str]) -> None:
        """Checks that every rule has a layer to which it applies.

        Args:
            names: of all layers that could be quantized.

        Raises:
            ValueError: where a pattern matches no layer, or earlier rules take every layer that it matches; the message
                names each such rule, and the nearest names or the rules that were first.
        """
        names = list(names)
        taken: dict[str, int] = {}  # by name: the number of the rule that counts
        problems = []
        for number, rule in enumerate(self.rules, start=1):
            matched = [name for name in names if rule.matches(name)]
            what = f"rule {number}: expected pattern {rule.pattern!r} to match"
            if not matched:
                problems.append(f"{what} a layer, but none of {len(names)} matches{_examples(rule.pattern, names)}")
            elif all(name in taken for name in matched):
                first = ", ".join(map(str, sorted({taken[name] for name in matched})))
                problems.append(
                    f"{what} a layer that no earlier rule takes, but all {len(matched)} are taken by rule {first}"
                )
            for name in matched:
                taken.setdefault(name, number)
        _raise_all("Recipe.check", problems)

    def differences(self, other: "Recipe") -> list[str]:
        """What differs, a line each: ``defaults.bits: 4, in the other 3``; empty where the recipes are equal.

        Rules are compared by their place and by what they state.
        """
        mine, its = _stated(self), _stated(other)
        nothing = "not stated"
        return [
            f"{place}: {mine.get(place, nothing)}, in the other {its.get(place, nothing)}"
            for place in dict.fromkeys((*mine, *its))
            if mine.get(place) != its.get(place)
        ]


def _two_grids(stated: Mapping[str, Any]) -> list[str]:
    """What is wrong where options state superblocks and a grid."""
    if stated.get("superblocks") is None:
        return []
    return [
        f"expected no {option} beside superblocks, which have their own, but got {stated[option]!r}"
        for option in _OF_GRID
        if option in stated
    ]


def _stated(recipe: Recipe) -> dict[str, str]:
    """Everything that a recipe states, by where it stands."""
    stated = {"format": recipe.format, "rotation": recipe.rotation} | {
        f"defaults.{key}": value for key, value in recipe.defaults.to_dict().items()
    }
    for number, rule in enumerate(recipe.rules, start=1):
        stated |= {f"rule {number}.{key}": value for key, value in rule.to_dict().items()}
    return {place: json.dumps(value) for place, value in stated.items()}


def _examples(pattern: str, names: Sequence[str]) -> str:
    """Names that a pattern may have meant."""
    nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0.8)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    return f"; they are named as {names[0]!r} and {names[-1]!r}" if names else ""


def _normalized(options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with numbers that may have a fraction as floats, so 1 and 1.0 are one recipe."""
    return {
        name: float(value) if name in _FRACTIONS and value not in ("auto", None) else value
        for name, value in options.items()
    }


def _parse_json(text: str) -> Any:
    """JSON in which no key comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ValueError(f"key {key!r} twice in one table")
            table[key] = value
        return table

    return json.loads(text, object_pairs_hook=unique)


@functools.cache
def _validator(definition: str | None) -> "Draft202012Validator":
    """The schema of a whole recipe, or of one of its parts."""
    from jsonschema import Draft202012Validator, validators  # noqa: PLC0415  (not for whoever makes no recipe)

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    if definition is not None:
        schema = {"$defs": schema["$defs"], "$ref": f"#/$defs/{definition}"}
    # The standard's integers include 4.0, and Python's numbers nan.
    checker = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda _, value: isinstance(value, int) and not isinstance(value, bool),
            "number": lambda _, value: _is_finite(value),
            "object": lambda _, value: isinstance(value, Mapping),
            "array": lambda _, value: isinstance(value, list | tuple),
        }
    )
    of_ours: Any = validators
    return cast("Draft202012Validator", of_ours.extend(Draft202012Validator, type_checker=checker)(schema))


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _errors(document: Any, definition: str | None = None) -> list[str]:
    """What is wrong with a recipe or a part of it, by place."""
    found = _validator(definition).iter_errors(document)
    in_order = sorted(found, key=lambda error: [(isinstance(key, str), key) for key in error.absolute_path])
    return list(dict.fromkeys(line for error in in_order for line in _described(error, part=definition is not None)))


def _described(error: "ValidationError", *, part: bool) -> Iterator[str]:
    """What one error of the schema says: where, what was expected, what came."""
    where, place = "", list(error.absolute_path)
    if not part and place[:1] == ["rules"] and len(place) > 1:
        where, place = f"rule {int(place[1]) + 1}: ", place[2:]
    elif not part and place[:1] == ["defaults"] and (len(place) > 1 or error.validator == "additionalProperties"):
        where, place = "defaults: ", place[1:]
    schema = cast("Mapping[str, Any]", error.schema)
    instance: Any = error.instance
    if error.validator == "additionalProperties":
        known = list(schema["properties"])
        for key in (key for key in instance if key not in known):
            got = f"{reprlib.repr(key)}{_nearest_key(str(key), known)}"
            yield f"{where}expected keys {', '.join(known)}, but got {got}"
    elif error.validator == "required":
        missing = next(key for key in schema["required"] if key not in instance)
        yield f"{where}expected a {missing}, but got none"
    else:
        requirement = schema["description"].partition(":")[0]
        subject = f"{place[0]} to be " if place else ""
        yield (f"{where}expected {subject}{requirement[:1].lower()}{requirement[1:]}, but got {reprlib.repr(instance)}")


def _nearest_key(key: str, known: Sequence[str]) -> str:
    """A question after an unknown key: whether another one was meant."""
    places = dict.fromkeys(known, "")
    if "defaults" in known:
        places |= {option.name: " in defaults" for option in fields(LayerOptions)}
    nearest = difflib.get_close_matches(key.lower().replace("-", "_"), places, n=1)
    return f"; did you mean {nearest[0]!r}{places[nearest[0]]}?" if nearest else ""


def _raise_first(where: str, errors: Sequence[str]) -> None:
    if errors:
        raise ValueError(f"{where}: {errors[0]}")


def _raise_all(where: str, errors: Sequence[str]) -> None:
    """One error after its place, several on lines of their own."""
    if len(errors) <= 1:
        _raise_first(where, errors)
        return
    shown = [f"\n  {error}" for error in errors[:_MOST_ERRORS]]
    more = f"\n  and {len(errors) - _MOST_ERRORS} more" if len(errors) > _MOST_ERRORS else ""
    raise ValueError(f"{where}: {len(errors)} errors:{''.join(shown)}{more}")
