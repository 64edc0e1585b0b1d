"""Handle errors: the answer reports them, and nothing is raised.

python examples/errors.py image.jpg "add a red hat"
"""

import asyncio
import sys

from step1x_edit import MCPClient


async def main(image_path: str, prompt: str) -> None:
    params = {"image_path": image_path, "prompt": prompt}
    async with MCPClient() as mcp_client:
        result = await mcp_client.call_tool("edit_image", params)

        if result["status"] == "error":
            print(f"Error: {result['error']}")
            # Handle error
        else:
            print(f"Success: {result['output_path']}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
