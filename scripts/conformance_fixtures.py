"""Our server with the suite's fixtures added: `conformance.py` tests it for full conformance.

Everything around the fixtures is what users get: the application, its guard and its mount, and the
middleware that shapes failures. The names and the texts are the suite's.
"""

from __future__ import annotations

import base64
import io
import json
import secrets
from typing import Any, Final

import mcp_types
from fastmcp import Context, FastMCP
from fastmcp.prompts import Message
from fastmcp.tools import ToolResult
from mcp.shared.exceptions import MCPError
from mcp_types import (
    AudioContent,
    ElicitRequest,
    ElicitRequestFormParams,
    EmbeddedResource,
    ImageContent,
    InputRequiredResult,
    ListRootsRequest,
    SamplingMessage,
    TextContent,
    TextResourceContents,
)
from PIL import Image

from step1x_edit.interfaces import server
from step1x_edit.interfaces.cli import app
from step1x_edit.interfaces.mcp.server import build_mcp

WAV: Final = base64.b64encode(
    b"RIFF\x26\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\2\0\0\0\0\0"
).decode()


def a_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG: Final = a_png()
IMAGE: Final = ImageContent(
    type="image", data=base64.b64encode(PNG).decode(), mime_type="image/png"
)
SIGNED: Final = secrets.token_hex(8)
"""The request state that we issued; anything else has been tampered with."""


def text(said: str) -> ToolResult:
    return ToolResult([TextContent(type="text", text=said)])


def resource(uri: str, media_type: str, content: str) -> EmbeddedResource:
    contents = TextResourceContents(uri=uri, mime_type=media_type, text=content)
    return EmbeddedResource(type="resource", resource=contents)


def ask(message: str, **properties: dict[str, Any]) -> ElicitRequest:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))


def sample(prompt: str, max_tokens: int) -> mcp_types.CreateMessageRequest:
    message = SamplingMessage(role="user", content=TextContent(type="text", text=prompt))
    return mcp_types.CreateMessageRequest(
        params=mcp_types.CreateMessageRequestParams(messages=[message], max_tokens=max_tokens)
    )


def answer(context: Context, key: str) -> Any:
    """The client's answer to an input request."""
    return (context.input_responses or {}).get(key)


def content_of(given: Any) -> dict[str, Any]:
    return dict(getattr(given, "content", None) or {})


STRING: Final = {"type": "string"}
NAME: Final = ask("What is your name?", name=STRING)


def add_plain(mcp: FastMCP) -> None:
    """Tools that return one kind of content each."""

    @mcp.tool
    def test_simple_text() -> ToolResult:
        """A text."""
        return text("This is a simple text response for testing.")

    @mcp.tool
    def test_image_content() -> ToolResult:
        """A picture."""
        return ToolResult([IMAGE])

    @mcp.tool
    def test_audio_content() -> ToolResult:
        """A sound."""
        return ToolResult([AudioContent(type="audio", data=WAV, mime_type="audio/wav")])

    @mcp.tool
    def test_embedded_resource() -> ToolResult:
        """A resource."""
        content = "This is an embedded resource content."
        return ToolResult([resource("test://embedded-resource", "text/plain", content)])

    @mcp.tool
    def test_multiple_content_types() -> ToolResult:
        """Several things."""
        said = TextContent(type="text", text="Multiple content types test:")
        data = json.dumps({"test": "data", "value": 123})
        mixed = resource("test://mixed-content-resource", "application/json", data)
        return ToolResult([said, IMAGE, mixed])

    @mcp.tool
    async def test_tool_with_logging(context: Context) -> ToolResult:
        """Logs while it works."""
        for said in ("Tool execution started", "Tool processing data", "Tool execution completed"):
            await context.info(said)
        return text("logged")

    @mcp.tool
    async def test_logging_tool(context: Context) -> ToolResult:
        """Logs, if the client asks for it."""
        await context.info("working")
        return text("logged")

    @mcp.tool
    def test_error_handling() -> ToolResult:
        """Fails."""
        raise RuntimeError("This tool intentionally returns an error for testing")

    @mcp.tool
    async def test_tool_with_progress(context: Context) -> ToolResult:
        """Reports progress."""
        for progress in (0, 50, 100):
            await context.report_progress(progress, 100)
        return text("done")

    @mcp.tool
    def test_missing_capability(context: Context) -> ToolResult:
        """Needs a client that supports sampling."""
        if capabilities(context).sampling is None:
            raise MCPError(
                mcp_types.MISSING_REQUIRED_CLIENT_CAPABILITY,
                "this tool needs sampling",
                {"requiredCapabilities": {"sampling": {}}},
            )
        return text("sampling is there")


def capabilities(context: Context) -> mcp_types.ClientCapabilities:
    parameters = context.session.client_params
    assert parameters is not None
    return parameters.capabilities


def add_asking(mcp: FastMCP) -> None:
    """Tools that ask the client while they run, as in the older revisions."""

    async def elicit(context: Context, message: str, properties: dict[str, Any]) -> Any:
        schema = {"type": "object", "properties": properties, "required": []}
        return await context.session.elicit_form(message, schema, context.request_id)

    @mcp.tool
    async def test_sampling(prompt: str, context: Context) -> ToolResult:
        """Asks the client's model."""
        message = SamplingMessage(role="user", content=TextContent(type="text", text=prompt))
        said = await context.session.create_message(
            [message], max_tokens=100, related_request_id=context.request_id
        )
        return text(f"LLM response: {getattr(said.content, 'text', '')}")

    @mcp.tool
    async def test_elicitation(message: str, context: Context) -> ToolResult:
        """Asks the user."""
        asked = {
            "username": STRING | {"description": "User's response"},
            "email": STRING | {"description": "User's email address"},
        }
        said = await elicit(context, message, asked)
        return text(f"User response: action={said.action}, content={said.content}")

    @mcp.tool
    async def test_elicitation_sep1034_defaults(context: Context) -> ToolResult:
        """Asks for values that have defaults."""
        asked = {
            "name": STRING | {"default": "John Doe"},
            "age": {"type": "integer", "default": 30},
            "score": {"type": "number", "default": 95.5},
            "status": STRING | {"enum": ["active", "inactive", "pending"], "default": "active"},
            "verified": {"type": "boolean", "default": True},
        }
        said = await elicit(context, "Please fill in", asked)
        return text(f"Elicitation completed: action={said.action}, content={said.content}")

    @mcp.tool
    async def test_elicitation_sep1330_enums(context: Context) -> ToolResult:
        """Asks for choices."""
        options = ["option1", "option2", "option3"]
        titled = [
            {"const": f"value{number}", "title": f"{word} Option"}
            for number, word in enumerate(("First", "Second", "Third"), start=1)
        ]
        asked = {
            "untitledSingle": STRING | {"enum": options},
            "titledSingle": STRING | {"oneOf": titled},
            "legacyEnum": STRING
            | {
                "enum": ["opt1", "opt2", "opt3"],
                "enumNames": ["Option One", "Option Two", "Option Three"],
            },
            "untitledMulti": {"type": "array", "items": STRING | {"enum": options}},
            "titledMulti": {"type": "array", "items": {"anyOf": titled}},
        }
        said = await elicit(context, "Please choose", asked)
        return text(f"Elicitation completed: action={said.action}, content={said.content}")


def add_asking_again(mcp: FastMCP) -> None:
    """Tools that ask through their result, as in the revision of 2026-07-28."""

    @mcp.tool
    def test_streaming_elicitation(context: Context) -> ToolResult | InputRequiredResult:
        """Asks for a name."""
        return _greeting(context)

    @mcp.tool
    def test_input_required_result_elicitation(
        context: Context,
    ) -> ToolResult | InputRequiredResult:
        """Asks for a name."""
        return _greeting(context)

    def _greeting(context: Context) -> ToolResult | InputRequiredResult:
        name = content_of(answer(context, "user_name")).get("name")
        if not isinstance(name, str):
            return InputRequiredResult(input_requests={"user_name": NAME})
        return text(f"Hello, {name}!")

    @mcp.tool
    def test_input_required_result_sampling(context: Context) -> ToolResult | InputRequiredResult:
        """Asks the client's model."""
        said = answer(context, "capital_question")
        if said is None:
            asked = sample("What is the capital of France?", 100)
            return InputRequiredResult(input_requests={"capital_question": asked})
        return text(getattr(said.content, "text", "nothing"))

    @mcp.tool
    def test_input_required_result_list_roots(
        context: Context,
    ) -> ToolResult | InputRequiredResult:
        """Asks for roots."""
        said = answer(context, "client_roots")
        if said is None:
            return InputRequiredResult(input_requests={"client_roots": ListRootsRequest()})
        return text(f"Roots: {', '.join(str(root.uri) for root in said.roots)}")

    @mcp.tool
    def test_input_required_result_request_state(
        context: Context,
    ) -> ToolResult | InputRequiredResult:
        """Asks, and keeps state."""
        if answer(context, "confirm") is None:
            asked = ask("Please confirm", ok={"type": "boolean"})
            return InputRequiredResult(input_requests={"confirm": asked}, request_state=SIGNED)
        return text("state-ok" if context.request_state == SIGNED else "state-lost")

    @mcp.tool
    def test_input_required_result_tampered_state(
        context: Context,
    ) -> ToolResult | InputRequiredResult:
        """Asks, and requires its state back unchanged."""
        if context.request_state is None:
            asked = ask("Please confirm", ok={"type": "boolean"})
            return InputRequiredResult(input_requests={"confirm": asked}, request_state=SIGNED)
        if context.request_state != SIGNED:
            raise MCPError(mcp_types.INVALID_PARAMS, "the request state is not what it was")
        return text("state-ok")

    @mcp.tool
    def test_input_required_result_multiple_inputs(
        context: Context,
    ) -> ToolResult | InputRequiredResult:
        """Asks for three things at once."""
        asked = {
            "user_name": NAME,
            "greeting": sample("Generate a greeting", 50),
            "client_roots": ListRootsRequest(),
        }
        if any(answer(context, key) is None for key in asked):
            return InputRequiredResult(input_requests=asked, request_state=SIGNED)
        return text("all there")

    @mcp.tool
    def test_input_required_result_multi_round(
        context: Context,
    ) -> ToolResult | InputRequiredResult:
        """Asks twice."""
        if answer(context, "step2") is not None:
            return text("done")
        if answer(context, "step1") is not None:
            asked = ask("Step 2: What is your favorite color?", color=STRING)
            return InputRequiredResult(input_requests={"step2": asked}, request_state="round-2")
        asked = ask("Step 1: What is your name?", name=STRING)
        return InputRequiredResult(input_requests={"step1": asked}, request_state="round-1")

    @mcp.tool
    def test_input_required_result_capabilities(
        context: Context,
    ) -> ToolResult | InputRequiredResult:
        """Asks for what the client supports."""
        can, asked = capabilities(context), dict[str, Any]()
        if can.sampling is not None:
            asked["greeting"] = sample("Generate a greeting", 50)
        if can.elicitation is not None:
            asked["user_name"] = NAME
        return InputRequiredResult(input_requests=asked) if asked else text("nothing to ask")

    @mcp.prompt
    def test_input_required_result_prompt(context: Context) -> Any:
        """Asks before it answers."""
        said = answer(context, "user_context")
        if said is None:
            asked = ask("What context should the prompt use?", context=STRING)
            return InputRequiredResult(input_requests={"user_context": asked})
        return f"The context is {content_of(said).get('context')}"


def add_resources_and_prompts(mcp: FastMCP) -> None:
    """Resources and prompts."""

    @mcp.resource("test://static-text", mime_type="text/plain", description="A text")
    def static_text() -> str:
        return "This is the content of the static text resource."

    @mcp.resource("test://static-binary", mime_type="image/png", description="A picture")
    def static_binary() -> bytes:
        return PNG

    @mcp.resource("test://watched-resource", mime_type="text/plain", description="It changes")
    def watched() -> str:
        return "watched"

    @mcp.resource("test://template/{id}/data", mime_type="application/json", description="Any")
    def template(id: str) -> str:  # noqa: A002 - the suite's name
        return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})

    @mcp.prompt
    def test_simple_prompt() -> str:
        """A text."""
        return "This is a simple prompt for testing."

    @mcp.prompt
    def test_prompt_with_arguments(arg1: str, arg2: str) -> str:
        """A text with two placeholders."""
        return f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"

    @mcp.prompt
    def test_prompt_with_embedded_resource(resourceUri: str) -> list[Message]:
        """A resource and a text."""
        content = "Embedded resource content for testing."
        return [
            Message(resource(resourceUri, "text/plain", content)),
            Message("Please process the embedded resource above."),
        ]

    @mcp.prompt
    def test_prompt_with_image() -> list[Message]:
        """A picture and a text."""
        return [Message(IMAGE), Message("Please analyze the image above.")]


def build(*arguments: Any, **options: Any) -> FastMCP:
    mcp = build_mcp(*arguments, **options)
    for add in (add_plain, add_asking, add_asking_again, add_resources_and_prompts):
        add(mcp)
    return mcp


if __name__ == "__main__":
    setattr(server, "build_mcp", build)  # noqa: B010 - a name that the module only imports
    app(["serve"])
