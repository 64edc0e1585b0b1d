"""The core of an assistant that edits pictures for its user.

python examples/assistant.py portrait.jpg "change to night scene"
"""

import asyncio
import sys

from step1x_edit import MCPClient


class ImageEditingAssistant:
    def __init__(self) -> None:
        self.mcp_client = MCPClient()

    async def edit_image(self, image_path: str, instruction: str) -> str:
        """Edit image based on natural language instruction."""
        result = await self.mcp_client.call_tool(
            "edit_image", {"image_path": image_path, "prompt": instruction}
        )
        return str(result["output_path"])

    async def cleanup(self) -> None:
        """Free GPU resources."""
        await self.mcp_client.call_tool("offload_gpu", {})


async def main(image_path: str, instruction: str) -> None:
    assistant = ImageEditingAssistant()
    print(await assistant.edit_image(image_path, instruction))
    await assistant.cleanup()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
