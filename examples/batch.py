"""Edit three pictures, each with a separate prompt.

python examples/batch.py img1.jpg img2.jpg img3.jpg
"""

import asyncio
import sys

from step1x_edit import MCPClient


async def batch_process(image_paths: list[str]) -> None:
    async with MCPClient() as session:
        # Process multiple images
        result = await session.call_tool(
            "batch_edit_images",
            {
                "image_paths": image_paths,
                "prompts": ["add a hat", "change to night scene", "add sunglasses"],
                "num_steps": 28,
            },
        )

        print(f"Processed: {result['summary']['total']}")
        print(f"Success: {result['summary']['successes']}")
        print(f"Failed: {result['summary']['failures']}")


if __name__ == "__main__":
    asyncio.run(batch_process(sys.argv[1:]))
