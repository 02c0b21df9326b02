"""Schemas of the kinds that the JSON-Schema-Test-Suite has, those that are followed and others."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_SHORT: Schema = {"type": "string", "maxLength": 6}
LEAVES: list[Schema] = [
    {"type": "integer", "minimum": -99, "maximum": 99},
    {"type": "integer", "minimum": 0, "maximum": 5},
    {"type": "integer", "exclusiveMinimum": 3, "maximum": 400},
    {"type": "integer", "minimum": -7, "exclusiveMaximum": 8},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 2.5},
    {"type": "boolean"},
    {"type": "null"},
    _SHORT,
    {"type": "string", "minLength": 3, "maxLength": 9},
    {"type": "string", "pattern": "^[a-f]{2,4}$"},
    {"type": "string", "pattern": "^(cat|dog)-\\d{2}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "time"},
    {"const": "fixed"},
    {"const": 17},
    {"const": None},
    {"enum": ["red", "amber", "green"]},
    {"enum": [1, "two", None, False]},
    {"type": "string", "enum": ["a", "b c", 'd"e', "f\\g", "ü"]},
    {"type": ["integer", "null"], "minimum": 1, "maximum": 9},
    {"type": ["string", "boolean"], "maxLength": 4},
    {"anyOf": [{"type": "boolean"}, {"const": "unknown"}]},
    {"oneOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 30}]},
    {"allOf": [{"type": "integer", "minimum": 2, "maximum": 20}]},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
    {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}, "c": {"type": "null"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"a": _SHORT, "b": _SHORT}, "minProperties": 1},
    {"type": "object", "properties": {"a": _SHORT, "b": _SHORT}, "maxProperties": 1},
    {
        "type": "object",
        "properties": {"inner": {"type": "object", "properties": {"deep": {"const": 1}},
                                 "required": ["deep"]}},
        "required": ["inner"],
    },
    {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "null"}},
             "required": ["kind", "x"]},
            {"type": "object", "properties": {"kind": {"const": "b"}, "y": {"type": "boolean"}},
             "required": ["kind", "y"]},
        ],
    },
    {"title": "T", "description": "d", "default": 1, "x-note": 1, "type": "boolean"},
    {"properties": {"a": {"type": "boolean"}}, "required": ["a"]},
]  # fmt: skip


def _wrapped(leaf: Schema) -> list[Schema]:
    return [
        leaf,
        {"type": "object", "properties": {"value": leaf, "n": {"const": 0}},
         "required": ["value"], "additionalProperties": False},
        {"type": "array", "items": leaf, "minItems": 1, "maxItems": 2},
        {"anyOf": [leaf, {"const": "otherwise"}]},
        {"$defs": {"it": leaf}, "type": "object",
         "properties": {"one": {"$ref": "#/$defs/it"}}, "required": ["one"]},
    ]  # fmt: skip


FOLLOWED: list[Schema] = [
    *(each for leaf in LEAVES for each in _wrapped(leaf)),
    # Lists that a model ends when it likes, and trees.
    {"$defs": {"node": {"type": "object", "properties": {
        "value": {"type": "boolean"},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["value", "next"]}}, "$ref": "#/$defs/node"},
    {"definitions": {"it": {"enum": [3, 4]}}, "type": "array",
     "items": {"$ref": "#/definitions/it"}, "minItems": 1, "maxItems": 3},
]  # fmt: skip

IGNORED: dict[str, Any] = {
    "multipleOf": {"type": "integer", "multipleOf": 2},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "minContains": {"type": "array", "items": {}, "minContains": 1},
    "maxContains": {"type": "array", "items": {}, "maxContains": 1},
    "not": {"not": {"type": "integer"}},
    "if": {"type": "integer", "if": {"minimum": 2}, "then": {"maximum": 5}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"type": "object"}}},
    "dependencies": {"type": "object", "dependencies": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "nullable": {"type": "integer", "nullable": True},
    "requird": {"type": "object", "properties": {"a": {}}, "requird": ["a"]},
    "allOf": {"allOf": [{"type": "integer"}, {"minimum": 2}]},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "oneOf of objects": {"oneOf": [{"type": "object"}, {"type": "object", "properties": {}}]},
    "anyOf": {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}]},
    "format": {"type": "string", "format": "iban"},
    "minLength": {"type": "string", "pattern": "^a+$", "minLength": 2},
    "maxLength": {"type": "string", "format": "date", "maxLength": 2},
    "pattern": {"type": "string", "format": "date", "pattern": "^2"},
    "minimum": {"minimum": 2},
    "minLength of none": {"minLength": 2},
    "minimum of text": {"type": "string", "minimum": 2},
    "minimum beside enum": {"enum": [1, 2], "minimum": 2},
    "minimum beside $ref": {"$defs": {"x": {"type": "integer"}}, "$ref": "#/$defs/x", "minimum": 3},
    "enum": {"type": "string", "enum": ["a", 1]},
    "const": {"type": "integer", "const": "a"},
    "required": {"type": "object", "required": ["a"]},
    "required of others": {"type": "object", "properties": {"a": {}}, "required": ["z"]},
    "type": {"type": []},
    "type of a draft": {"type": "any"},
    "$ref": {"$ref": "http://example.com/schema"},
    "$anchor": {"$defs": {"x": {"$anchor": "foo", "type": "integer"}}, "$ref": "#foo"},
    "$ref elsewhere": {"properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}},
    "$ref to nothing": {"$ref": "#/$defs/none"},
    "patternProperties": {
        "type": "object", "properties": {"a": {}}, "patternProperties": {"^b": {"type": "string"}},
    },
    "propertyNames": {
        "type": "object", "properties": {"a": {}}, "propertyNames": {"maxLength": 1},
    },
    "two patterns": {"type": "object", "patternProperties": {"^a": {}, "^b": {}}},
    "looking ahead": {"type": "string", "pattern": "^(?=a)b$"},
    "pattern of a quote": {"type": "string", "pattern": '^"$'},
    "pattern of a tab": {"type": "object", "patternProperties": {"^[\\t\\n]a": {}}},
    "pattern of much": {"type": "string", "pattern": '^[^"]{0,129}$'},
    "pattern of many": {"type": "object", "propertyNames": {"pattern": "^a{200,}(b|.c){129}$"}},
    "items of a draft": {"type": "array", "items": [{"type": "integer"}]},
}  # fmt: skip
"""By what they have that would not be followed."""
