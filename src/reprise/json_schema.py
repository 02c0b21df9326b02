"""Which JSON schemas xgrammar follows to the letter.

It ignores what it does not know, and what it knows in some combinations. So each keyword has to be
listed here to be accepted, and what is listed is followed: tests hold both.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from reprise.arguments import shown
from reprise.errors import RequestError
from reprise.patterns import check_text_pattern

MAX_DEPTH = 64
"""Of schemas in schemas: the compiler recurses."""
MAX_COUNT = 10_000
"""Of ``maxLength``, ``maxItems`` and the like: each is a state of an automaton."""

MAX_PAIRED = 32
"""Schemas of objects, each two of which may differ in another property."""

_ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "example", "$schema", "$id", "id", "$comment",
    "deprecated", "readOnly", "writeOnly", "$defs", "definitions", "strict",
    "contentEncoding", "contentMediaType", "discriminator",
})  # fmt: skip
"""They say nothing of what is valid; and definitions, which count where they are referred to."""
_OF_TYPES: Mapping[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset({
        "properties", "required", "additionalProperties", "patternProperties", "propertyNames",
        "minProperties", "maxProperties",
    }),
    "boolean": frozenset(),
    "null": frozenset(),
}  # fmt: skip
FORMATS = frozenset({
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
    "uri-reference", "uri-template", "json-pointer", "relative-json-pointer",
})  # fmt: skip
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BRANCHES = ("anyOf", "oneOf", "allOf")
_REMEDIES = {
    "oneOf": "use anyOf, or let the branches differ in type, or in a const of one property",
    "allOf": "write the one schema that has all of it",
    "unevaluatedProperties": "use additionalProperties",
    "unevaluatedItems": "use items",
    "$dynamicRef": "use $ref with #/$defs/NAME",
    "nullable": "use anyOf with {'type': 'null'}",
    "additionalItems": "use items beside prefixItems",
    "dependencies": "use anyOf of the cases",
}


def check_schema(schema: Any, where: str) -> None:
    """Refuse a schema of which something would be ignored.

    Args:
        schema: As ``json.loads`` made it.
        where: What it is called in errors.

    Raises:
        RequestError: It names the keyword and its place.
    """
    _Check(schema, where).visit(schema, "#", 0)


class _Check:
    def __init__(self, root: Any, where: str) -> None:
        self._root = root
        self._where = where

    def refuse(self, path: str, what: str, remedy: str = "") -> RequestError:
        return RequestError(f"{self._where} at {path}: {what}" + (f"; {remedy}" if remedy else ""))

    def visit(self, schema: Any, path: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self.refuse(path[:200], f"schemas are nested more than {MAX_DEPTH} deep")
        if isinstance(schema, bool):
            return
        if not isinstance(schema, Mapping):
            raise self.refuse(path, f"{shown(schema)} is no schema", "give an object")
        for name in ("$defs", "definitions"):
            self._visit_named(schema, name, path, depth)
        names = {each for each in schema if each not in _ANNOTATIONS and not each.startswith("x-")}
        if "$ref" in names:
            self._alone("$ref", names, path)
            self._resolve(schema["$ref"], path)
        elif branching := [each for each in _BRANCHES if each in names]:
            self._alone(branching[0], names, path)
            self._visit_branches(branching[0], schema[branching[0]], path, depth)
        elif "const" in names or "enum" in names:
            self._visit_values(schema, names, path)
        else:
            self._visit_type(schema, names, path, depth)

    def _alone(self, name: str, names: set[str], path: str) -> None:
        others = sorted(names - {name})
        if others:
            raise self.refuse(
                path, f"{', '.join(others)} beside {name} would be ignored",
                f"move it into what {name} has",
            )  # fmt: skip

    def _visit_named(self, schema: Mapping[str, Any], name: str, path: str, depth: int) -> None:
        found = schema.get(name, {})
        if not isinstance(found, Mapping):
            raise self.refuse(path, f"{name}={shown(found)} is no object of schemas")
        for key, each in found.items():
            self.visit(each, f"{path}/{name}/{key}", depth + 1)

    def _referred(self, reference: Any, path: str = "#") -> Any:
        """What a ``$ref`` says."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise self.refuse(
                path, f"$ref={shown(reference)} is not followed", "refer to #/$defs/NAME"
            )
        found = self._root
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or key not in found:
                raise self.refuse(path, f"$ref={shown(reference)} refers to nothing")
            found = found[key]
        return found

    def _resolve(self, reference: Any, path: str) -> None:
        self._referred(reference, path)
        parts = reference.split("/")[1:]
        if parts and (len(parts) != 2 or parts[0] not in ("$defs", "definitions")):
            # What is visited nowhere else would not be checked.
            raise self.refuse(
                path, f"$ref={shown(reference)} is not followed", "refer to #/$defs/NAME"
            )

    def _visit_branches(self, name: str, branches: Any, path: str, depth: int) -> None:
        if not isinstance(branches, Sequence) or isinstance(branches, str) or not branches:
            raise self.refuse(path, f"{name}={shown(branches)} is no list of schemas")
        for number, each in enumerate(branches):
            self.visit(each, f"{path}/{name}/{number}", depth + 1)
        if name == "allOf" and len(branches) > 1:
            raise self.refuse(path, "allOf of several schemas is not supported", _REMEDIES[name])
        if name == "oneOf" and not self._disjoint(branches):
            raise self.refuse(
                path, "oneOf of schemas that may overlap is not supported", _REMEDIES[name]
            )

    def _disjoint(self, branches: Sequence[Any]) -> bool:
        """No value is valid by two of them, as far as can be seen from outside."""
        return _all_apart([self._outside(each) for each in branches])

    def _outside(self, schema: Any) -> Any:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                return schema
            try:
                schema = self._referred(schema["$ref"])
            except RequestError:
                break  # what is referred to is looked at later
        return {}

    def _visit_values(self, schema: Mapping[str, Any], names: set[str], path: str) -> None:
        name = "const" if "const" in names else "enum"
        others = sorted(names - {name, "type"})
        if others:
            raise self.refuse(path, f"{', '.join(others)} beside {name} would be ignored")
        values = [schema["const"]] if name == "const" else schema["enum"]
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise self.refuse(path, f"enum={shown(values)} is no list of values")
        if "type" in names:
            types = self._types(schema["type"], path)
            for each in values:
                if not any(_is_of(each, kind) for kind in types):
                    raise self.refuse(
                        path, f"{name} has {shown(each)}, which is no {' or '.join(types)}"
                    )

    def _types(self, given: Any, path: str) -> list[str]:
        found = [given] if isinstance(given, str) else given
        if (
            not isinstance(found, list)
            or not found
            or not all(isinstance(each, str) and each in _OF_TYPES for each in found)
        ):
            raise self.refuse(path, f"type={shown(given)}", f"give one of {', '.join(_OF_TYPES)}")
        return found

    def _visit_type(
        self, schema: Mapping[str, Any], names: set[str], path: str, depth: int
    ) -> None:
        if "type" in names:
            types = self._types(schema["type"], path)
        elif "properties" in names:
            types = ["object"]
        elif names & {"items", "prefixItems"}:
            types = ["array"]
        else:
            types = []
        known = frozenset().union(*(_OF_TYPES[each] for each in types))
        for name in sorted(names - {"type"} - known):
            if any(name in each for each in _OF_TYPES.values()):
                has = f"type {' or '.join(types)}" if types else "no type"
                raise self.refuse(path, f"{name} in a schema of {has} would be ignored")
            raise self.refuse(path, f"the keyword {name} is not supported", _REMEDIES.get(name, ""))
        for name in _COUNTS:
            value = schema.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
                raise self.refuse(
                    path, f"{name}={shown(value)}", f"give a whole number from 0 to {MAX_COUNT}"
                )
        if "string" in types:
            self._check_text(schema, names, path)
        if "array" in types:
            self._visit_items(schema, path, depth)
        if "object" in types:
            self._visit_object(schema, names, path, depth)

    def _check_text(self, schema: Mapping[str, Any], names: set[str], path: str) -> None:
        if "pattern" in names:
            if not isinstance(schema["pattern"], str):
                raise self.refuse(path, f"pattern={shown(schema['pattern'])} is no text")
            check_text_pattern(schema["pattern"], f"{self._where} at {path}: pattern")
        form = schema.get("format")
        if "format" in names and (not isinstance(form, str) or form not in FORMATS):
            raise self.refuse(
                path, f"format={shown(form)} is not supported",
                f"give one of {', '.join(sorted(FORMATS))}, or a pattern",
            )  # fmt: skip
        strong = sorted(names & {"pattern", "format"})
        others = [*strong[1:], *sorted(names & {"minLength", "maxLength"})]
        if strong and others:
            raise self.refuse(path, f"{', '.join(others)} beside {strong[0]} would be ignored")

    def _visit_items(self, schema: Mapping[str, Any], path: str, depth: int) -> None:
        if "items" in schema:
            self.visit(schema["items"], f"{path}/items", depth + 1)
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise self.refuse(path, f"prefixItems={shown(prefix)} is no list of schemas")
        for number, each in enumerate(prefix):
            self.visit(each, f"{path}/prefixItems/{number}", depth + 1)

    def _visit_object(
        self, schema: Mapping[str, Any], names: set[str], path: str, depth: int
    ) -> None:
        for name in ("properties", "patternProperties"):
            self._visit_named(schema, name, path, depth)
        for name in ("additionalProperties", "propertyNames"):
            if name in names:
                self.visit(schema[name], f"{path}/{name}", depth + 1)
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
            raise self.refuse(path, f"required={shown(required)} is no list of names")
        for each in required:
            if each not in properties:
                raise self.refuse(
                    path, f"required has {shown(each)}, which properties has not", "add it there"
                )
        patterns = schema.get("patternProperties", {})
        for each in patterns:
            check_text_pattern(each, f"{self._where} at {path}: patternProperties")
        special = sorted(names & {"patternProperties", "propertyNames"})
        beside = sorted(names & {"properties", "minProperties", "maxProperties"})
        if special and (beside or len(special) > 1 or len(patterns) > 1):
            raise self.refuse(
                path, f"{' and '.join([*special, *beside])} together are not supported",
                "give one of them, with one pattern",
            )  # fmt: skip


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    types: dict[str, Any] = {
        "string": str, "integer": int, "number": int | float, "array": list, "object": dict,
        "null": type(None), "boolean": bool,
    }  # fmt: skip
    return isinstance(value, types[kind])


def _all_apart(schemas: Sequence[Any]) -> bool:
    """Whether no value is valid by two of them; False if that is not seen at once. There may be
    thousands: pairs are looked at where there are few."""
    if len(schemas) < 2:
        return True
    if not all(isinstance(each, Mapping) for each in schemas):
        return False
    listed = [each for each in schemas if _values(each) is not None]
    others = [each for each in schemas if _values(each) is None]
    objects = [each for each in others if _kinds(each) == {"object"}]
    kinds = [_kinds(each) for each in others if _kinds(each) != {"object"}]
    if objects:
        kinds.append({"object"})
    if listed:
        kinds.append(set().union(*map(_kinds, listed)))
    if len(kinds) > 1 and not (all(kinds) and sum(map(len, kinds)) == len(set().union(*kinds))):
        return False
    return _values_apart([_values(each) or [] for each in listed]) and _objects_apart(objects)


def _values_apart(lists: Sequence[Sequence[Any]]) -> bool:
    """Whether no value is in two of the lists."""
    seen: dict[Any, int] = {}
    try:
        return all(
            seen.setdefault(_hashable(value), number) == number
            for number, values in enumerate(lists)
            for value in values
        )
    except RecursionError:
        return False


def _hashable(value: Any) -> Any:
    """Something that is equal where the values are."""
    if isinstance(value, Mapping):
        return frozenset((name, _hashable(each)) for name, each in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _objects_apart(schemas: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any two of them have a property, which both require, that tells them apart."""
    if len(schemas) < 2:
        return True
    names = [_required(each) for each in schemas]
    if any(_property_tells(schemas, name) for name in sorted(frozenset.intersection(*names))):
        return True
    if not 2 < len(schemas) <= MAX_PAIRED:
        return False
    return all(_objects_apart(pair) for pair in itertools.combinations(schemas, 2))


def _required(schema: Mapping[str, Any]) -> frozenset[str]:
    given = schema.get("required", [])  # of what is referred to, and will be looked at later
    return frozenset(each for each in given if isinstance(each, str)) if (
        isinstance(given, list)
    ) else frozenset()  # fmt: skip


def _property_tells(schemas: Sequence[Mapping[str, Any]], name: str) -> bool:
    found = [each.get("properties", {}) for each in schemas]
    return _all_apart([each.get(name) if isinstance(each, Mapping) else None for each in found])


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    found = schema.get("enum")
    return list(found) if isinstance(found, list) else None


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """Types of what is valid, a whole number being a number; empty: unknown."""
    given = schema.get("type")
    if given is None:
        values = _values(schema)
        if values is None:
            return set()
        return {next(kind for kind in _OF_TYPES if _is_of(each, kind)) for each in values}
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        return set()
    numbers = {"number", "integer"}
    return {*found, *numbers} if numbers & {*found} else {*found}
