"""Tools of a chat request: which of them the model may call, must call, and the grammar of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct
from tokenizers import Tokenizer

from vlmrt.actors.edge.json_schema import JsonObject, check_cost, json_rule, read_schema
from vlmrt.actors.edge.refusals import NULL, is_null, refuse
from vlmrt.actors.edge.response_format import NAME, OutputGrammar, check_size, lark_text
from vlmrt.runtime.errors import RequestError

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 << 10  # of all parameters together
MAX_CALLS = 128  # of one answer that must call
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class FunctionDefinition(Struct, frozen=True):
    name: str
    description: str | None = None
    parameters: JsonObject = NULL  # a JSON schema; none: the function takes nothing
    strict: bool | None = None


class Tool(Struct, frozen=True):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Struct, frozen=True):
    name: str


class AllowedTool(Struct, frozen=True):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Struct, frozen=True):
    mode: Literal["auto", "required"]
    tools: list[AllowedTool]


class ChosenTools(Struct, frozen=True):
    """A `tool_choice` that names tools."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


ToolChoice = Literal["none", "auto", "required"] | ChosenTools


class CalledFunction(Struct, frozen=True):
    name: Annotated[str, Meta(min_length=1)]
    arguments: str = "{}"  # JSON of an object


class MadeCall(Struct, frozen=True):
    """A call of an assistant's earlier turn, as the client sends it back."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class KnownTool(Struct, frozen=True):
    """A tool whose schema has been read."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    param: str

    def definition(self) -> dict[str, Any]:
        """As chat templates print it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return {"type": "function", "function": function}

    def arguments_schema(self) -> dict[str, Any]:
        """Of the object that a call passes."""
        schema = self.parameters
        if schema is None:
            return NO_PARAMETERS
        if not schema.keys() & {"type", "$ref", "anyOf", "allOf"}:
            return {"type": "object", **schema}
        kind = schema.get("type", "object")
        refuse(kind != "object", f"{self.param}.type", f" = {kind!r}: a function takes an object")
        return schema


class ToolUse(Struct, frozen=True):
    """What an answer may, must or must not call."""

    mode: Literal["none", "auto", "required", "named"]
    shown: tuple[KnownTool, ...] = ()  # in the prompt
    allowed: tuple[KnownTool, ...] = ()  # in a call
    parallel: bool = True  # more than one call is allowed

    @property
    def max_calls(self) -> int:
        return MAX_CALLS if self.parallel else 1


NO_TOOLS = ToolUse("none")


class CallTags(Struct, frozen=True):
    """How a grammar writes the marks around a call: single tokens where the tokenizer has them, else their text."""

    begin: str
    end: str


def call_tags(tokenizer: Tokenizer) -> CallTags:
    added = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    begin, end = (f"<[{added[tag]}]>" if tag in added else lark_text(tag) for tag in (CALL_BEGIN, CALL_END))
    return CallTags(begin, end)


def tool_use(
    tools: Sequence[Tool] | None,
    tool_choice: ToolChoice | None,
    parallel_tool_calls: bool | None = None,
    *,
    functions: Raw = NULL,
    function_call: Raw = NULL,
) -> ToolUse:
    """Raises: RequestError 400 naming field, value and bound."""
    for name, value, instead in (("functions", functions, "tools"), ("function_call", function_call, "tool_choice")):
        refuse(not is_null(value), name, f" is not supported: send {instead} instead", "unsupported_value")
    known = _known_tools(tools or ())
    parallel = parallel_tool_calls is not False
    if isinstance(tool_choice, ChosenTools):
        return _named(known, tool_choice, parallel)
    mode = tool_choice or ("auto" if known else "none")
    refuse(mode == "required" and not known, "tool_choice", " = 'required' needs tools")
    if mode == "none" or not known:
        return NO_TOOLS
    return ToolUse(mode, known, known, parallel)


def _known_tools(tools: Sequence[Tool]) -> tuple[KnownTool, ...]:
    refuse(len(tools) > MAX_TOOLS, "tools", f" has {len(tools)} tools, more than {MAX_TOOLS}")
    num_bytes = sum(len(bytes(tool.function.parameters)) for tool in tools)
    too_long = num_bytes > MAX_TOOLS_BYTES
    refuse(too_long, "tools", f" have parameters of {num_bytes} bytes, more than {MAX_TOOLS_BYTES}", "schema_too_large")
    known: dict[str, KnownTool] = {}
    for index, tool in enumerate(tools):
        param, function = f"tools[{index}].function", tool.function
        name = function.name
        bad = not NAME.fullmatch(name)
        refuse(bad, f"{param}.name", f" = {name[:60]!r} may hold 1 to 64 letters, digits, '_' and '-' only")
        refuse(name in known, f"{param}.name", f" = {name!r} names two tools")
        parameters = function.parameters
        schema = None if is_null(parameters) else read_schema(parameters, f"{param}.parameters")
        known[name] = KnownTool(name, function.description, schema, f"{param}.parameters")
    check_cost([tool.parameters for tool in known.values() if tool.parameters is not None], "tools")
    return tuple(known.values())


def _named(known: tuple[KnownTool, ...], choice: ChosenTools, parallel: bool) -> ToolUse:
    if choice.type == "function":
        if choice.function is None:
            raise _missing("tool_choice.function")
        return ToolUse("named", known, (_find(known, choice.function.name, "tool_choice.function.name"),), False)
    asked = choice.allowed_tools
    if asked is None:
        raise _missing("tool_choice.allowed_tools")
    param = "tool_choice.allowed_tools.tools"
    refuse(not asked.tools, param, " is an empty list: at least one tool is needed")
    refuse(len(asked.tools) > MAX_TOOLS, param, f" has {len(asked.tools)} tools, more than {MAX_TOOLS}")
    names = [_find(known, tool.function.name, f"{param}[{i}].function.name").name for i, tool in enumerate(asked.tools)]
    allowed = tuple(tool for tool in known if tool.name in names)
    return ToolUse(asked.mode, allowed, allowed, parallel)


def _missing(param: str) -> RequestError:
    return RequestError(f"{param} is required", param=param, code="missing_field")


def _find(known: Sequence[KnownTool], name: str, param: str) -> KnownTool:
    for tool in known:
        if tool.name == name:
            return tool
    raise RequestError(f"{param} = {name[:60]!r} is not among the tools", param=param, code="invalid_value")


def answer_grammar(use: ToolUse, answer: OutputGrammar | None, tags: CallTags) -> OutputGrammar | None:
    """The grammar of an answer that may or must call; `answer` is what its text is restricted to.

    A schema restricts the text and leaves the model free to call instead; any other grammar is of the whole answer.
    Raises: RequestError 400 where the answer must be a call and must be something else as well.
    """
    if use.mode in ("none", "auto"):
        if use.mode == "none" or answer is None or not answer.rule:
            return answer
        return _checked(f"start: {answer.rule} | calls\n{_calls(use, tags)}", answer.param)
    if answer is not None:
        raise RequestError(
            f"{answer.param} cannot restrict an answer that tool_choice makes a call",
            param=answer.param,
            code="invalid_value",
        )
    if use.mode == "named":
        (tool,) = use.allowed
        return _checked(f"start: {json_rule(tool.arguments_schema())}", tool.param)
    return _checked(f"start: calls\n{_calls(use, tags)}", "tools")


def _checked(text: str, param: str) -> OutputGrammar:
    grammar = OutputGrammar(text, param)
    check_size(grammar)
    return grammar


def _calls(use: ToolUse, tags: CallTags) -> str:
    """Rules of one or more calls in the form that Qwen's models know; a schema stays the root of its references."""
    more = f' ("\\n" call){{0,{use.max_calls - 1}}}' if use.max_calls > 1 else ""
    bodies = [
        f"body_{index}: {lark_text(call_head(tool.name))} {json_rule(tool.arguments_schema())}"
        for index, tool in enumerate(use.allowed)
    ]
    names = " | ".join(f"body_{index}" for index in range(len(bodies)))
    call = f'call: {tags.begin} "\\n" ({names}) "}}\\n" {tags.end}'
    return "\n".join((f"calls: call{more}", call, *bodies))


def call_head(name: str) -> str:
    """A call's JSON up to its arguments."""
    return f'{{"name": "{name}", "arguments": '
