"""Call each of the five tools once: edit, batch, status, offload, release.

python examples/five_tools.py portrait.jpg img1.jpg img2.jpg img3.jpg
"""

import asyncio
import sys

from step1x_edit import MCPClient


async def main(portrait: str, images: list[str]) -> None:
    async with MCPClient() as mcp_client:
        result = await mcp_client.call_tool(
            "edit_image",
            {
                "image_path": portrait,
                "prompt": "add a red hat on the person",
                "num_steps": 28,
                "guidance_scale": 6.0,
            },
        )
        print(f"Saved to: {result['output_path']}")

        result = await mcp_client.call_tool(
            "batch_edit_images",
            {"image_paths": images, "prompts": "add a hat", "output_dir": "./outputs"},
        )
        print(result["message"])

        status = await mcp_client.call_tool("get_gpu_status", {})
        print(f"Model location: {status['gpu_status']['model_location']}")
        print(f"GPU memory: {status['gpu_status']['gpu_memory_allocated_gb']}GB")

        result = await mcp_client.call_tool("offload_gpu", {})
        print(result["message"])

        result = await mcp_client.call_tool("release_gpu", {})
        print(result["message"])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
