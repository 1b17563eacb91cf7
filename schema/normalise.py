# SPDX-License-Identifier: GPL-2.0-or-later
"""The one place that turns what peers send into what verbs take.

Engines send numbers as strings, enumerations as the numbers of their own tables, booleans as
"true" and flat string maps where the published signatures say otherwise.  Everything becomes:

    UUID -> lower-case str        int, uint, long, ulong, IntString -> int
    enum -> the schema's name     float, FloatString -> float
    list -> list                  boolean, BoolString -> bool
    object, map -> dict           password -> Secret

An absent or null optional value becomes its default, and so does "" where a string makes no
sense.  What cannot be used is InvalidParams (-32602), which names the parameter, says what was
expected and what came; the value of a password is never shown, nor that of an object or a list.

Each verb is compiled once into closures; checking Volume.create takes some microseconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vdsm_storage import errors
from vdsm_storage.schema import replies
from vdsm_storage.schema.loader import Param, Schema, Type, Verb
from vdsm_storage.schema.scalars import (
    BLANK_IS_VALUE,
    SCALARS,
    Convert,
    UnusableError,
    show,
    show_kind,
    similar,
    to_enum,
)

# What a verb's `unusable` may name: errors that say what was wrong, and why.
REFUSALS: Mapping[str, Callable[..., errors.AgentError]] = {
    "BadSecretRequest": errors.BadSecretRequest,
}


@dataclass(slots=True)
class Checked:
    """Canonical values for the verb's function, and what the caller should log."""

    values: dict[str, object]
    warnings: list[str] = field(default_factory=list)


class Checker:
    """Checks requests (and, in tests, replies) against the schema.

    With `strict`, a parameter that the schema does not know is an error, else a warning.
    """

    def __init__(self, schema: Schema, strict: bool = False) -> None:
        self._schema = schema
        self._strict = strict
        # By strictness, then by verb.
        self._verbs: tuple[dict[str, Convert], dict[str, Convert]] = ({}, {})
        self._replies: dict[str, replies.Check | None] = {}

    def knows(self, verb: str) -> bool:
        """Whether the schema has a verb of that wire name."""
        return self._schema.find(verb) is not None

    def check_params(
        self,
        verb: str,
        params: Mapping[str, object] | Sequence[object] | None,
        strict: bool | None = None,
    ) -> Checked:
        """Canonical values of every parameter.  InvalidParams; MethodNotFound."""
        strict = self._strict if strict is None else strict
        convert = self._verbs[strict].get(verb)
        if convert is None:
            convert = self._compile(self._schema.verb(verb), strict)
            self._verbs[strict][verb] = convert
        if type(params) is not dict:
            params = self._named(verb, params)
        checked = Checked({})
        try:
            checked.values = convert(params, checked.warnings)  # type: ignore[assignment]
        except UnusableError as bad:
            parameter = bad.path or "(params)"
            refusal = REFUSALS.get(self._schema.verb(verb).unusable)
            if refusal is not None:
                # What came is left out: a secret may have been put into the wrong place.
                reason = bad.reason.partition(", got ")[0]
                raise refusal(parameter=parameter, reason=reason) from None
            raise errors.InvalidParams(
                method=verb, parameter=parameter, reason=bad.reason
            ) from None
        return checked

    def check_reply(self, verb: str, result: object) -> None:
        """InternalError when a result on its way to the wire is not what the schema promises."""
        problems = self.reply_problems(verb, result)
        if problems:
            shown = "; ".join(problems[:5])
            raise errors.InternalError(reason=f"{verb} answers {shown}", flow_id="-")

    def reply_problems(self, verb: str, result: object) -> list[str]:
        """What is wrong with a result; empty when all is well."""
        if verb not in self._replies:
            found = self._schema.verb(verb)
            self._replies[verb] = replies.compile_reply(self._schema, found)
        check = self._replies[verb]
        if check is None:
            return [] if result is True else ["a verb without result answers true"]
        problems: list[str] = []
        check(result, "result", problems)
        return problems

    def _named(
        self, verb: str, params: Mapping[str, object] | Sequence[object] | None
    ) -> dict[str, object]:
        """Positional parameters by name, in the order of the schema."""
        if params is None:
            return {}
        if isinstance(params, Mapping):
            return dict(params)
        if not isinstance(params, (list, tuple)):
            raise errors.InvalidParams(
                method=verb,
                parameter="(params)",
                reason=f"expected an object of named parameters, got {show_kind(params)}",
            )
        names = [param.name for param in self._schema.verb(verb).params]
        if len(params) > len(names):
            raise errors.InvalidParams(
                method=verb,
                parameter=f"number {len(names) + 1}",
                reason=f"this verb takes at most {len(names)} ({', '.join(names) or 'none'})",
            )
        return dict(zip(names, params, strict=False))

    def _compile(self, verb: Verb, strict: bool) -> Convert:
        compiler = _Compiler(self._schema, verb.namespace)
        unknown = _refuse_unknown if strict else _warn_unknown("parameter")
        return compiler.fields(verb.params, verb.ignored, unknown)


# -- unknown keys ------------------------------------------------------------------------------

# Takes the keys that the schema does not know, those that it knows, and the warnings.
Unknown = Callable[[Iterable[str], Iterable[str], list[str]], None]


def _warn_unknown(what: str) -> Unknown:
    def warn(strays: Iterable[str], known: Iterable[str], warnings: list[str]) -> None:
        warnings.extend(
            f"unknown {what} {key!r:.60} was ignored{similar(key, known)}" for key in strays
        )

    return warn


def _refuse_unknown(strays: Iterable[str], known: Iterable[str], _warnings: list[str]) -> None:
    for key in strays:
        raise UnusableError(f"no such parameter{similar(key, known)}", f"{key:.60}")


# -- the compiler ------------------------------------------------------------------------------


class _Compiler:
    """Turns types into closures; one for each verb."""

    def __init__(self, schema: Schema, namespace: str) -> None:
        self._schema = schema
        self._namespace = namespace
        self._done: dict[str, Convert] = {}

    def convert(self, name: str) -> Convert:
        scalar = SCALARS.get(name)
        if scalar is not None:
            return scalar
        if name in self._done:
            return self._done[name]
        # A type that contains itself meets this stand-in, which finds the real one when called.
        self._done[name] = lambda value, warnings: self._done[name](value, warnings)
        self._done[name] = made = self._make(name)
        return made

    def _make(self, name: str) -> Convert:
        if name.startswith("["):
            return _list(self.convert(name[1:-1]))
        found = self._schema.type(name, self._namespace)
        if found.kind == "object":
            return self._object(found)
        if found.kind == "enum":
            return to_enum(found)
        if found.kind == "map":
            return _map(self.convert(found.key), self.convert(found.value))
        if found.kind == "union":
            return self._union(found)
        assert found.kind == "flat", f"{name}: kind {found.kind}"
        return _flat(found)

    def _object(self, found: Type) -> Convert:
        inner = self.fields(
            found.fields, (), None if found.extra == "keep" else _warn_unknown(f"{found.name} key")
        )

        def convert(value: object, warnings: list[str]) -> object:
            if type(value) is not dict:
                raise UnusableError(
                    f"expected an object ({found.name}), got {show_kind(value)}"
                )
            return inner(value, warnings)

        return convert

    def fields(
        self, params: tuple[Param, ...], ignored: tuple[str, ...], unknown: Unknown | None
    ) -> Convert:
        """Converts a dict key by key.  `unknown` None keeps the keys that are not in `params`,
        and then leaves absent ones absent: the object is passed on as it came."""
        keep = unknown is None
        specs = [
            (
                param.name,
                self.convert(param.type),
                param.optional,
                param.optional and param.type not in BLANK_IS_VALUE,
                self._default(param),
                param.aliases,
            )
            for param in params
        ]
        known = frozenset(n for p in params for n in (p.name, *p.aliases)) | set(ignored)
        types = {param.name: param.type for param in params}

        def convert(raw: object, warnings: list[str]) -> object:
            source: dict[str, object] = raw  # type: ignore[assignment]
            values: dict[str, object] = {}
            for name, to_value, optional, blank_is_absent, default, aliases in specs:
                value = source.get(name)
                if value is None and aliases:
                    value = _first(source, aliases)
                if value is None or (blank_is_absent and value == ""):
                    if not optional:
                        raise _missing(name, types, source, known)
                    if not keep:
                        values[name] = _fresh(default)
                    continue
                try:
                    values[name] = to_value(value, warnings)
                except UnusableError as bad:
                    raise bad.under(name) from None
            if not known.issuperset(source):
                strays = {key: value for key, value in source.items() if key not in known}
                if unknown is None:
                    values.update(strays)
                else:
                    unknown(strays, types, warnings)
            return values

        return convert

    def _default(self, param: Param) -> object:
        return None if param.default is None else self.convert(param.type)(param.default, [])

    def _union(self, found: Type) -> Convert:
        if found.tag:
            return self._tagged(found)
        members = [self.convert(name) for name in found.of]
        types = [None if n in SCALARS else self._schema.type(n, self._namespace) for n in found.of]

        def convert(value: object, warnings: list[str]) -> object:
            best: UnusableError | None = None
            score = -1
            for member, kind in zip(members, types, strict=True):
                heard: list[str] = []
                try:
                    result = member(value, heard)
                except UnusableError as bad:
                    fit = _fit(kind, value)
                    if fit > score:
                        best, score = bad, fit
                    continue
                warnings.extend(heard)
                return result
            names = " or ".join(found.of)
            if best is None or score == 0:
                raise UnusableError(f"expected {names}, got {show_kind(value)}")
            raise UnusableError(f"{best.reason} (expected {names})", best.path)

        return convert

    def _tagged(self, found: Type) -> Convert:
        variants = {tag: self.convert(name) for tag, name in found.variants.items()}
        default = next(iter(variants))

        def convert(value: object, warnings: list[str]) -> object:
            if type(value) is not dict:
                raise UnusableError(f"expected an object ({found.name}), got {show_kind(value)}")
            tag = value.get(found.tag, default)
            variant = variants.get(tag) if isinstance(tag, str) else None
            if variant is None:
                expected = ", ".join(variants)
                raise UnusableError(f"expected one of {expected}, got {show(tag)}", found.tag)
            return variant(value, warnings)

        return convert


def _fresh(default: object) -> object:
    """A default that the verb's function may change."""
    return default.copy() if isinstance(default, (list, dict)) else default


def _first(source: Mapping[str, object], names: tuple[str, ...]) -> object:
    for name in names:
        value = source.get(name)
        if value is not None:
            return value
    return None


def _missing(
    name: str, types: Mapping[str, str], source: Mapping[str, object], known: Iterable[str]
) -> UnusableError:
    what = f"expected {types[name]}"
    if name in source:
        return UnusableError(f"must not be {show(source[name])}, {what}", name)
    strays = [str(key) for key in source if key not in set(known)]
    close = difflib.get_close_matches(name, strays, 1)
    hint = f"; {close[0]} was given, is that what is meant?" if close else ""
    return UnusableError(f"is missing, {what}{hint}", name)


def _fit(kind: Type | None, value: object) -> int:
    """How well a value resembles an object type: the number of keys that they share."""
    if kind is None or not isinstance(value, dict):
        return 0
    return sum(param.name in value for param in kind.fields)


def _list(item: Convert) -> Convert:
    def convert(value: object, warnings: list[str]) -> object:
        if not isinstance(value, (list, tuple)):
            raise UnusableError(f"expected a list, got {show_kind(value)}")
        values = []
        for index, one in enumerate(value):
            try:
                values.append(item(one, warnings))
            except UnusableError as bad:
                raise bad.under(f"[{index}]") from None
        return values

    return convert


def _map(to_key: Convert, to_value: Convert) -> Convert:
    def convert(value: object, warnings: list[str]) -> object:
        if type(value) is not dict:
            raise UnusableError(f"expected an object, got {show_kind(value)}")
        values = {}
        for key, one in value.items():
            try:
                values[to_key(key, warnings)] = to_value(one, warnings)
            except UnusableError as bad:
                raise bad.under(f"[{key!r:.60}]") from None
        return values

    return convert


def _flat(found: Type) -> Convert:
    def convert(value: object, warnings: list[str]) -> object:
        if type(value) is dict:
            value = _first(value, found.of)
        if type(value) is str:
            return value
        keys = ", ".join(found.of)
        raise UnusableError(
            f"expected a string, or an object with one of {keys}; got {show_kind(value)}"
        )

    return convert
