"""Recipes: which options a layer gets, from Python and from files, and what is said of a recipe that is none."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, get_args

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import miniquant
from miniquant.presets import Preset, preset
from miniquant.recipe import SCHEMA, FormatName, LayerOptions, Recipe, Rule, Unseen
from miniquant.token_weights import SCHEMES

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [
    f"model.layers.{block}.{layer}"
    for block in range(12)
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
]
OPTIONS = (
    "bits, group_size, symmetric, superblocks, preset, ridge, token_weights, correction, stream_correction, unseen, "
    "min_tokens, skip"
)
SCHEMA_DOCUMENT: dict[str, Any] = json.loads(SCHEMA.read_text())


def glob_by_hand(pattern: str, name: str) -> bool:
    """``*``, ``?`` and characters as they are, a character at a time."""
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(glob_by_hand(pattern[1:], name[start:]) for start in range(len(name) + 1))
    return bool(name) and pattern[0] in ("?", name[0]) and glob_by_hand(pattern[1:], name[1:])


@given(st.text("ab.*?", min_size=1, max_size=8), st.text("ab.", max_size=8))
def test_globs_match_as_by_hand(pattern: str, name: str) -> None:
    assert Rule(pattern).matches(name) == glob_by_hand(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layers.1.mlp.down_proj", 1),
        ("*.down_proj", 12),
        ("*", 48),
        ("model.layers.?.mlp.*", 20),
        ("model.layers.[01].*", 8),
        ("model.layers.[!01].*", 32),
        ("down_proj", 0),  # the whole name
        ("*.DOWN_PROJ", 0),  # case counts
        (r"re:.*\.(q|k)_proj", 24),
        (r"re:model\.layers\.1\..*", 4),  # not 10 and 11
        ("re:down_proj", 0),  # the whole name here as well
        ("re:(?i).*DOWN_PROJ", 12),
    ],
)
def test_patterns_match_whole_names(pattern: str, expected: int) -> None:
    rule = Rule(pattern)
    assert sum(rule.matches(name) for name in NAMES) == expected


def test_first_rule_that_matches_counts_and_no_other() -> None:
    recipe = Recipe(
        LayerOptions(bits=3, group_size=32),
        [
            Rule("*.0.mlp.*", {"skip": True}),
            Rule("*.mlp.*", {"bits": 8, "symmetric": False}),
            Rule("*.down_proj", {"bits": 2}),
            Rule("*.k_proj", LayerOptions(bits=5)),
            Rule("*.11.*"),
        ],
    )
    assert recipe.options("model.layers.0.mlp.down_proj") == LayerOptions(bits=3, group_size=32, skip=True)
    assert recipe.options("model.layers.4.mlp.down_proj") == LayerOptions(bits=8, group_size=32, symmetric=False)
    assert recipe.options("model.layers.4.self_attn.k_proj") == LayerOptions(bits=5, group_size=64)
    assert recipe.options("model.layers.11.self_attn.q_proj") == recipe.defaults
    assert recipe.rule("model.layers.11.self_attn.q_proj") is recipe.rules[4]
    assert recipe.rule("lm_head") is None
    assert recipe.options("lm_head") == LayerOptions(bits=3, group_size=32)


def test_rule_takes_any_name() -> None:
    assert Recipe(rules=[Rule("*", {"bits": 2})]).options("") == LayerOptions(bits=2)
    assert Recipe(rules=[Rule("a*b", {"bits": 2})]).options("a\nb").bits == 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", get_args(Preset))
@pytest.mark.parametrize("ridge", ["auto", 0.5])
def test_arguments_are_those_of_the_call(name: Preset, ridge: Any, *, symmetric: bool) -> None:
    options = LayerOptions(bits=3, group_size=16, symmetric=symmetric, preset=name, ridge=ridge)
    arguments = options.arguments(torch.bfloat16)
    expected = {"bits": 3, "group_size": 16, "symmetric": symmetric, "scale_dtype": torch.bfloat16}
    expected |= miniquant.preset(name, symmetric=symmetric) | ({} if ridge == "auto" else {"ridge": 0.5})
    assert arguments == expected
    accumulator = miniquant.HessianAccumulator(48, halves=True)
    accumulator.update(torch.randn(64, 48))
    weight = torch.randn(8, 48)
    if ridge == "auto":
        result: miniquant.GptqResult = miniquant.gptq_auto(weight, accumulator, **arguments)
    else:
        result = miniquant.gptq(weight, accumulator.hessian(), **arguments)
    assert (result.bits, result.group_size, result.symmetric) == (3, 16, symmetric)
    assert result.full_range == options.full_range == (symmetric and name != "plain")
    assert result.scales.dtype == torch.bfloat16


def test_superblocks_take_the_place_of_a_grid() -> None:
    options = LayerOptions(superblocks="Q6_K", preset="fast", ridge=0.1)
    assert options.grid == (6, 16, True)
    assert options.full_range
    assert options.arguments(torch.float16) == {"ridge": 0.1, **preset("fast", kind="Q6_K")}
    assert "bits" not in options.to_dict()
    assert LayerOptions(bits=8, superblocks="Q4_K") == LayerOptions(superblocks="Q4_K")
    rules = [Rule("*.a", {"bits": 8}), Rule("*.b", {"superblocks": "Q6_K"}), Rule("*.c", {"preset": "plain"})]
    recipe = Recipe(LayerOptions(superblocks="Q4_K", preset="fast"), rules)
    assert recipe.options("x.a") == LayerOptions(bits=8, preset="fast")
    assert recipe.options("x.b") == LayerOptions(superblocks="Q6_K", preset="fast")
    assert recipe.options("x.c") == LayerOptions(superblocks="Q4_K", preset="plain")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("option", [{"bits": 4}, {"group_size": 32}, {"symmetric": False}], ids=str)
def test_superblocks_beside_a_grid_are_refused(option: dict[str, Any]) -> None:
    both = {"superblocks": "Q4_K", **option}
    (name,) = option
    message = f"expected no {name} beside superblocks, which have their own, but got {option[name]!r}"
    for make, where in (
        (lambda: Rule("*", both), "Rule: "),
        (lambda: Recipe.from_dict({"defaults": both}), "Recipe.from_dict: defaults: "),
        (lambda: Recipe.from_dict({"rules": [{"pattern": "*", **both}]}), "Recipe.from_dict: rule 1: "),
        (lambda: LayerOptions().with_stated(both), "LayerOptions: "),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(where + message)}$"):
            make()


def test_tokens_needed() -> None:
    assert [LayerOptions().tokens_needed(columns) for columns in (1, 128, 129, 4096)] == [16, 16, 17, 512]
    assert LayerOptions(min_tokens=3).tokens_needed(4096) == 3


def test_file_and_python_give_one_recipe(tmp_path: Path) -> None:
    toml = tmp_path / "recipe.toml"
    toml.write_text(
        'format = "gptq"\n[defaults]\nbits = 3\nridge = 1\n\n[[rules]]\npattern = "*.down_proj"\nbits = 8\n\n'
        "[[rules]]\npattern = 're:.*\\.[01]\\..*'\nskip = true\nmin_tokens = 5\nunseen = \"siblings\"\n"
    )
    document = {
        "$schema": "recipe.schema.json",
        "format": "gptq",
        "defaults": {"bits": 3, "ridge": 1.0},
        "rules": [
            {"pattern": "*.down_proj", "bits": 8},
            {"pattern": r"re:.*\.[01]\..*", "skip": True, "min_tokens": 5, "unseen": "siblings"},
        ],
    }
    plain, marked = tmp_path / "recipe.json", tmp_path / "marked.JSON"
    plain.write_text(json.dumps(document))
    marked.write_text(json.dumps(document), encoding="utf-8-sig")
    expected = Recipe(
        LayerOptions(bits=3, ridge=1.0),
        [
            Rule("*.down_proj", {"bits": 8}),
            Rule(r"re:.*\.[01]\..*", {"skip": True, "min_tokens": 5, "unseen": "siblings"}),
        ],
        "gptq",
    )
    assert Recipe.load(toml) == Recipe.load(plain) == Recipe.load(str(marked)) == expected
    assert Recipe.from_dict(document) == expected


def test_example_of_the_module_is_a_recipe(tmp_path: Path) -> None:
    text = (SCHEMA.parent / "recipe.py").read_text()
    example = text.split("beside this module::\n\n")[1].split("\nFor each layer")[0]
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(line.removeprefix("    ") for line in example.splitlines()))
    recipe = Recipe.load(path)
    recipe.check(NAMES)
    assert recipe.options("model.layers.1.self_attn.q_proj").skip
    assert not recipe.options("model.layers.10.self_attn.q_proj").skip
    assert recipe.options("model.layers.0.mlp.down_proj") == LayerOptions(bits=8, group_size=128)


def test_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("# nothing\n")
    assert Recipe.load(path) == Recipe() == Recipe.from_dict({})
    Recipe().check(NAMES)
    Recipe().check([])


OPTION_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "bits": st.integers(2, 8),
    "group_size": st.sampled_from([-1, 1, 64, 2**31 - 1]),
    "symmetric": st.booleans(),
    "preset": st.sampled_from(get_args(Preset)),
    "ridge": st.just("auto") | st.floats(0, allow_infinity=False) | st.integers(0, 3),
    "token_weights": st.sampled_from(SCHEMES),
    "correction": st.none() | st.floats(0, 1) | st.integers(0, 1),
    "stream_correction": st.none() | st.floats(0, 1) | st.integers(0, 1),
    "unseen": st.sampled_from(get_args(Unseen)),
    "min_tokens": st.none() | st.integers(1, 2**63 - 1),
    "skip": st.booleans(),
}
RULES = st.builds(Rule, st.text(min_size=1).map("*".__add__), st.fixed_dictionaries({}, optional=OPTION_VALUES))
RECIPES = st.builds(
    Recipe,
    st.fixed_dictionaries({}, optional=OPTION_VALUES).map(lambda options: LayerOptions(**options)),
    st.lists(RULES, max_size=3),
    st.none() | st.sampled_from(get_args(FormatName)),
)


@settings(max_examples=50)
@given(RECIPES)
def test_recipes_go_through_dict_and_json_unchanged(recipe: Recipe) -> None:
    document = recipe.to_dict()
    again = Recipe.from_dict(json.loads(json.dumps(document, allow_nan=False)))
    assert again == recipe == pickle.loads(pickle.dumps(recipe))  # noqa: S301  (of our own making)
    assert again.to_dict() == document
    assert recipe.differences(again) == []
    # The schema says the same to an editor, which knows nothing of our types.
    jsonschema.Draft202012Validator(SCHEMA_DOCUMENT).validate(document)


@settings(max_examples=50)
@given(RECIPES, RECIPES)
def test_different_recipes_differ_in_something(first: Recipe, second: Recipe) -> None:
    assert (first.differences(second) == []) == (first == second)


def test_differences_are_named() -> None:
    first = Recipe(LayerOptions(bits=3), [Rule("*.a", {"ridge": 1}), Rule("*.b", {})], "gptq")
    second = Recipe(LayerOptions(bits=4, preset="fast"), [Rule("*.c", {"skip": True})])
    assert first.differences(second) == [
        'format: "gptq", in the other null',
        "defaults.bits: 3, in the other 4",
        'defaults.preset: "best", in the other "fast"',
        'rule 1.pattern: "*.a", in the other "*.c"',
        "rule 1.ridge: 1.0, in the other not stated",
        'rule 2.pattern: "*.b", in the other not stated',
        "rule 1.skip: not stated, in the other true",
    ]
    assert first.differences(first) == []


def test_schema_is_one_and_has_the_options() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA_DOCUMENT)
    options = SCHEMA_DOCUMENT["$defs"]["options"]["properties"]
    assert {name: schema["default"] for name, schema in options.items()} == LayerOptions().to_dict()
    assert list(options) == [option.name for option in fields(LayerOptions)] == OPTIONS.split(", ")
    rule = SCHEMA_DOCUMENT["$defs"]["rule"]["properties"]
    assert list(rule) == ["pattern", *options]
    assert all(rule[name] == {"$ref": f"#/$defs/options/properties/{name}"} for name in options)
    assert options["preset"]["enum"] == list(get_args(Preset))
    assert options["token_weights"]["enum"] == list(SCHEMES)
    assert options["unseen"]["enum"] == list(get_args(Unseen))
    assert SCHEMA_DOCUMENT["properties"]["format"]["enum"] == [*get_args(FormatName), None]
    for schema in (*options.values(), rule["pattern"], *SCHEMA_DOCUMENT["properties"].values()):
        requirement, colon, meaning = schema["description"].partition(": ")
        assert requirement[0].isupper() or requirement[0] == '"'
        assert colon
        assert meaning.endswith(".")


def test_options_are_frozen() -> None:
    options = LayerOptions()
    with pytest.raises(AttributeError, match="cannot assign"):
        options.bits = 3  # type: ignore[misc]
    stated = {"bits": 3}
    rule = Rule("*", stated)
    stated["bits"] = 9
    assert rule.options == {"bits": 3}
    assert replace(LayerOptions(), bits=5) == LayerOptions(bits=5)
    with pytest.raises(ValueError, match="expected bits"):
        replace(LayerOptions(), bits=9)


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"bits": 9}, "bits to be an integer from 2 to 8, but got 9"),
    ({"bits": 1}, "bits to be an integer from 2 to 8, but got 1"),
    ({"bits": 4.0}, "bits to be an integer from 2 to 8, but got 4.0"),
    ({"bits": True}, "bits to be an integer from 2 to 8, but got True"),
    ({"bits": "4"}, "bits to be an integer from 2 to 8, but got '4'"),
    ({"bits": None}, "bits to be an integer from 2 to 8, but got None"),
    ({"group_size": 0}, "group_size to be a positive integer, or -1 for one group per row, but got 0"),
    ({"group_size": -2}, "group_size to be a positive integer, or -1 for one group per row, but got -2"),
    ({"group_size": 2**31}, "group_size to be a positive integer, or -1 for one group per row, but got 2147483648"),
    ({"group_size": []}, "group_size to be a positive integer, or -1 for one group per row, but got []"),
    ({"symmetric": 1}, "symmetric to be true or false, but got 1"),
    ({"superblocks": "Q4_0"}, "superblocks to be one of Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, but got 'Q4_0'"),
    ({"preset": "slow"}, "preset to be one of plain, fast, best, but got 'slow'"),
    ({"preset": None}, "preset to be one of plain, fast, best, but got None"),
    ({"ridge": -0.1}, 'ridge to be "auto", or a finite number of at least 0, but got -0.1'),
    ({"ridge": float("nan")}, 'ridge to be "auto", or a finite number of at least 0, but got nan'),
    ({"ridge": float("inf")}, 'ridge to be "auto", or a finite number of at least 0, but got inf'),
    ({"ridge": 10**400}, 'ridge to be "auto", or a finite number of at least 0, but got 1000'),
    ({"ridge": "Auto"}, "ridge to be \"auto\", or a finite number of at least 0, but got 'Auto'"),
    ({"ridge": False}, 'ridge to be "auto", or a finite number of at least 0, but got False'),
    (
        {"token_weights": "l2"},
        "token_weights to be one of uniform, norm, position, norm+position, gradient, but got 'l2'",
    ),
    ({"correction": 1.1}, "correction to be a number from 0 to 1, but got 1.1"),
    ({"correction": -1}, "correction to be a number from 0 to 1, but got -1"),
    ({"correction": float("nan")}, "correction to be a number from 0 to 1, but got nan"),
    ({"stream_correction": 1.1}, "stream_correction to be a number from 0 to 1, but got 1.1"),
    ({"correction": "auto"}, "correction to be a number from 0 to 1, but got 'auto'"),
    ({"unseen": "ignore"}, "unseen to be one of error, siblings, rtn, but got 'ignore'"),
    ({"min_tokens": 0}, "min_tokens to be a positive integer, but got 0"),
    ({"min_tokens": 1.5}, "min_tokens to be a positive integer, but got 1.5"),
    ({"skip": "yes"}, "skip to be true or false, but got 'yes'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    for make, where in (
        (lambda: LayerOptions(**options), "LayerOptions: expected "),
        (lambda: Rule("*", options), "Rule: expected "),
        (lambda: Recipe.from_dict({"defaults": options}), "Recipe.from_dict: defaults: expected "),
        (
            lambda: Recipe.from_dict({"rules": [{"pattern": "a"}, {"pattern": "*", **options}]}),
            "Recipe.from_dict: rule 2: expected ",
        ),
    ):
        with pytest.raises(ValueError, match="expected") as error:
            make()
        assert str(error.value).startswith(where + message)
        assert len(str(error.value)) < 200


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "unknown key": (
        "r.toml",
        b"[defaults]\nbit = 4\n",
        f"defaults: expected keys {OPTIONS}, but got 'bit'; did you mean 'bits'?",
    ),
    "key of another spelling": (
        "r.json",
        b'{"rules": [{"pattern": "*", "Group-Size": 4}]}',
        f"rule 1: expected keys pattern, {OPTIONS}, but got 'Group-Size'; did you mean 'group_size'?",
    ),
    "option outside defaults": (
        "r.toml",
        b"group_sise = 4\n",
        (
            "expected keys $schema, format, rotation, defaults, rules, but got 'group_sise'; "
            "did you mean 'group_size' in defaults?"
        ),
    ),
    "rule instead of rules": (
        "r.toml",
        b'[[rule]]\npattern = "*"\n',
        "expected keys $schema, format, rotation, defaults, rules, but got 'rule'; did you mean 'rules'?",
    ),
    "one table instead of an array": (
        "r.toml",
        b'[rules]\npattern = "*"\n',
        "expected rules to be an array of rules, but got {'pattern': '*'}",
    ),
    "rule that is a string": (
        "r.json",
        b'{"rules": ["*.down_proj"]}',
        "rule 1: expected a table of a pattern and options, but got '*.down_proj'",
    ),
    "no pattern": (
        "r.toml",
        b'[[rules]]\npattern = "a"\n[[rules]]\nbits = 3\n',
        "rule 2: expected a pattern, but got none",
    ),
    "empty pattern": (
        "r.toml",
        b'[[rules]]\npattern = ""\n',
        "rule 1: expected pattern to be a string that is not empty, but got ''",
    ),
    "pattern that is a number": (
        "r.json",
        b'{"rules": [{"pattern": 3}]}',
        "rule 1: expected pattern to be a string that is not empty, but got 3",
    ),
    "bad regular expression": (
        "r.toml",
        b"[[rules]]\npattern = 're:(a'\n",
        (
            "rule 1: expected pattern to be re: and a regular expression, but got 're:(a': missing ), unterminated "
            "subpattern at position 0"
        ),
    ),
    "regular expression too large": (
        "r.toml",
        b"[[rules]]\npattern = 're:a{99999999999999999999}'\n",
        (
            "rule 1: expected pattern to be re: and a regular expression, but got 're:a{99999999999999999999}': "
            "the repetition number is too large"
        ),
    ),
    "unknown format": (
        "r.toml",
        b'format = "onnx"\n',
        "expected format to be one of compressed-tensors, gptq, gptq_v2, gguf, miniquant, but got 'onnx'",
    ),
    "array": ("r.json", b"[]", "expected a table of format, rotation, defaults and rules, but got []"),
    "number": ("r.json", b"4", "expected a table of format, rotation, defaults and rules, but got 4"),
    "nothing": ("r.json", b"", "expected JSON, but got: Expecting value: line 1 column 1 (char 0)"),
    "cut off": (
        "r.json",
        b'{"defaults": {"bits"',
        "expected JSON, but got: Expecting ':' delimiter: line 1 column 21 (char 20)",
    ),
    "key twice in JSON": (
        "r.json",
        b'{"defaults": {"bits": 4, "bits": 3}}',
        "expected JSON, but got: key 'bits' twice in one table",
    ),
    "key twice in TOML": (
        "r.toml",
        b"[defaults]\nbits = 4\nbits = 3\n",
        "expected TOML, but got: Cannot overwrite a value",
    ),
    "not TOML": ("r.toml", b"bits: 4\n", "expected TOML, but got: Expected '=' after a key in a key/value pair"),
    "nan": (
        "r.json",
        b'{"defaults": {"ridge": NaN}}',
        'defaults: expected ridge to be "auto", or a finite number of at least 0, but got nan',
    ),
    "infinity in TOML": (
        "r.toml",
        b"[defaults]\nridge = inf\n",
        'defaults: expected ridge to be "auto", or a finite number of at least 0, but got inf',
    ),
    "number of many digits": (
        "r.json",
        b'{"defaults": {"bits": ' + b"9" * 5000 + b"}}",
        "expected JSON, but got: Exceeds the limit (4300 digits)",
    ),
    "date": (
        "r.toml",
        b"[defaults]\nbits = 2020-01-01\n",
        "defaults: expected bits to be an integer from 2 to 8, but got datetime.date(2020, 1, 1)",
    ),
    "nested deeply, JSON": ("r.json", b"[" * 200_000, "expected a recipe, but got JSON that is nested too deeply"),
    "nested deeply, TOML": (
        "r.toml",
        b"a = " + b"[" * 20_000,
        "expected a recipe, but got TOML that is nested too deeply",
    ),
    "not UTF-8": ("r.toml", b'# caf\xe9\nformat = "gptq"\n', "expected text in UTF-8, but got byte 0xe9 at offset 5"),
    "UTF-16": ("r.json", '{"defaults": {}}'.encode("utf-16"), "expected text in UTF-8, but got byte 0xff at offset 0"),
    "YAML": ("r.yaml", b"bits: 4\n", "expected a file whose name ends in .toml or .json, but got 'r.yaml'"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(tmp_path: Path, kind: str) -> None:
    name, content, message = BAD_FILES[kind]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected") as error:
        Recipe.load(path)
    assert str(error.value).startswith(f"Recipe.load: {path}: {message}")
    assert len(str(error.value)) < len(str(path)) + 250


GOOD_FILES = {
    "r.json": '{"format": "gptq", "defaults": {"bits": 3}, "rules": [{"pattern": "re:a.*[bc]", "ridge": 0.5}]}',
    "r.toml": 'format = "gptq"\n[defaults]\nbits = 3\n\n[[rules]]\npattern = "re:a.*[bc]"\nridge = 0.5\n',
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_damaged_files_are_read_or_named(tmp_path: Path, name: str, mutations: Any) -> None:
    path = tmp_path / name
    read = 0
    for content in mutations(GOOD_FILES[name].encode(), 400):
        path.write_bytes(content)
        try:
            recipe = Recipe.load(path)
            assert Recipe.from_dict(recipe.to_dict()) == recipe
            read += 1
        except ValueError as error:
            assert str(error).startswith(f"Recipe.load: {path}: ")  # noqa: PT017
    assert 0 < read < 400


def test_every_error_of_a_file_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[defaults]\nbits = 12\n[[rules]]\nbits = 3\nskipp = true\n[[rules]]\npattern = "*"\npreset = "x"\n'
    )
    with pytest.raises(ValueError, match="expected") as error:
        Recipe.load(path)
    assert str(error.value).splitlines() == [
        f"Recipe.load: {path}: 4 errors:",
        "  defaults: expected bits to be an integer from 2 to 8, but got 12",
        f"  rule 1: expected keys pattern, {OPTIONS}, but got 'skipp'; did you mean 'skip'?",
        "  rule 1: expected a pattern, but got none",
        "  rule 2: expected preset to be one of plain, fast, best, but got 'x'",
    ]
    with pytest.raises(ValueError, match="15 errors") as error:
        Recipe.from_dict({"rules": [{}] * 15})
    assert str(error.value).splitlines()[-2:] == ["  rule 10: expected a pattern, but got none", "  and 5 more"]


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        Recipe.load(tmp_path / "none.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.toml"):
        Recipe.load(tmp_path / "folder.toml")


any_recipe: Any = Recipe
any_rule: Any = Rule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: any_recipe({"bits": 4}), "Recipe: expected defaults to be LayerOptions (from_dict takes a dict)"),
        (
            lambda: any_recipe(rules=[Rule("a"), {"pattern": "b"}]),
            "Recipe: rule 2: expected a Rule (from_dict takes dicts)",
        ),
        (lambda: any_recipe(format="onnx"), "Recipe: expected format to be one of"),
        (lambda: any_rule("*", 4), "Rule: expected options to be LayerOptions or a mapping, but got 4"),
        (lambda: Rule("*", {"pattern": "a"}), "Rule: expected the names of options, but got 'pattern' among them"),
        (lambda: any_rule("*", {3: 4}), f"Rule: expected keys pattern, {OPTIONS}, but got 3"),
        (lambda: any_rule(None), "Rule: expected pattern to be a string that is not empty, but got None"),
        (
            lambda: any_recipe.from_dict(None),
            "Recipe.from_dict: expected a table of format, rotation, defaults and rules, but got None",
        ),
    ],
)
def test_wrong_types_in_python_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        make()
    assert str(error.value).startswith(message)


def test_check_names_rules_without_a_layer() -> None:
    recipe = Recipe(
        rules=[
            Rule("model.layers.3.mlp.down_prj", {"bits": 8}),
            Rule("*.mlp.*", {"bits": 8}),
            Rule("re:nothing", {"bits": 8}),
            Rule("*.q_proj", {"bits": 8}),
            Rule("model.layers.2.mlp.down_proj", {"bits": 4}),
            Rule("*.0.[ms]*", {"bits": 4}),
            Rule("re:.*(q_proj|mlp.*)", {"bits": 2}),
        ]
    )
    with pytest.raises(ValueError, match="4 errors") as error:
        recipe.check(NAMES)
    assert str(error.value).splitlines() == [
        "Recipe.check: 4 errors:",
        (
            "  rule 1: expected pattern 'model.layers.3.mlp.down_prj' to match a layer, but none of 48 matches; "
            "did you mean 'model.layers.3.mlp.down_proj'?"
        ),
        (
            "  rule 3: expected pattern 're:nothing' to match a layer, but none of 48 matches; they are named as "
            "'model.layers.0.self_attn.q_proj' and 'model.layers.11.mlp.down_proj'"
        ),
        (
            "  rule 5: expected pattern 'model.layers.2.mlp.down_proj' to match a layer that no earlier rule takes, "
            "but all 1 are taken by rule 2"
        ),
        (
            "  rule 7: expected pattern 're:.*(q_proj|mlp.*)' to match a layer that no earlier rule takes, "
            "but all 36 are taken by rule 2, 4"
        ),
    ]
    good = Recipe(rules=[Rule("*.0.mlp.down_proj"), Rule("*.mlp.*", {"bits": 8}), Rule("*", {"bits": 3})])
    good.check(iter(NAMES))
    with pytest.raises(ValueError, match=r"rule 1: expected pattern '\*\.x' to match a layer, but none of 0 matches$"):
        Recipe(rules=[Rule("*.x")]).check([])
