"""What a request's text must be, in the words of the OpenAI API and of vLLM's."""

from __future__ import annotations

from typing import Any

from reprise.arguments import shown
from reprise.server.errors import ApiError

_KEYS = {
    "text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"},
    "structural_tag": None,
}  # fmt: skip
"""By type; None: xgrammar reads it, and knows."""
_TYPES = tuple(_KEYS)
_SCHEMA_KEYS = {"name", "description", "schema", "strict"}


def structured_outputs(request: Any) -> dict[str, Any] | None:
    """Fields of :class:`reprise.StructuredOutputsParams`; None: any text will do.

    Raises:
        ApiError: ``response_format`` is malformed, or both fields ask for something.
    """
    form = _of_format(request.response_format)
    given: dict[str, Any] | None = request.structured_outputs
    if form is not None and given is not None:
        raise ApiError(
            400, "response_format and structured_outputs exclude each other",
            param="structured_outputs",
        )  # fmt: skip
    return given if form is None else form


def _of_format(form: Any) -> dict[str, Any] | None:
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    if kind not in _TYPES:
        raise _invalid(form, f"its type is one of {', '.join(_TYPES)}")
    _check_keys(form, form, _KEYS[kind])
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "structural_tag":
        return {"structural_tag": _tag(form)}
    inner = form.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict | bool):
        raise _invalid(form, "json_schema needs an object with the field schema")
    _check_keys(form, inner, _SCHEMA_KEYS)
    if not isinstance(inner.get("strict"), bool | None):
        raise _invalid(form, "strict is true or false")
    return {"json": schema}


def _check_keys(form: Any, given: dict[str, Any], known: set[str] | None) -> None:
    """A schema in another place than it belongs to would say nothing."""
    if known is None:
        return
    for key, value in given.items():
        if key not in known and value is not None:
            remedy = f"it has the unknown key {key[:64]!r}"
            if key == "schema":
                remedy += "; give type 'json_schema', and json_schema with name and schema"
            raise _invalid(form, remedy)


def _tag(form: dict[str, Any]) -> dict[str, Any]:
    """xgrammar's form of a structural tag; the older one has structures and triggers."""
    if "structures" not in form:
        return form
    structures, triggers = form["structures"], form.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list):
        raise _invalid(form, "structures and triggers are lists")
    tags = []
    for each in structures:
        if not isinstance(each, dict) or not {"begin", "schema", "end"} <= each.keys():
            raise _invalid(form, "each of structures has begin, schema and end")
        content = {"type": "json_schema", "json_schema": each["schema"]}
        tags.append({"type": "tag", "begin": each["begin"], "content": content, "end": each["end"]})
    return {
        "type": "structural_tag",
        "format": {"type": "triggered_tags", "triggers": triggers, "tags": tags},
    }


def _invalid(form: Any, remedy: str) -> ApiError:
    return ApiError(400, f"response_format={shown(form)}: {remedy}", param="response_format")
