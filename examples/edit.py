"""Edit one picture, print the GPU's state, and free it.

python examples/edit.py input.jpg
"""

import asyncio
import sys

from step1x_edit import MCPClient


async def main(image_path: str) -> None:
    async with MCPClient("mcp_server.py") as session:
        # Edit image
        result = await session.call_tool(
            "edit_image",
            {"image_path": image_path, "prompt": "add a red hat", "num_steps": 28},
        )
        print(f"Result: {result['output_path']}")

        # Check GPU status
        status = await session.call_tool("get_gpu_status", {})
        print(f"GPU: {status['gpu_status']['model_location']}")

        # Offload when done
        await session.call_tool("offload_gpu", {})


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
