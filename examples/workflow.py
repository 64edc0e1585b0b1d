"""Edit all pictures in a folder, one after the other.

python examples/workflow.py photos/
"""

import asyncio
import sys
from pathlib import Path

from step1x_edit import MCPClient


async def automated_workflow(image_dir: str) -> None:
    """Process all images in directory."""
    images = list(Path(image_dir).glob("*.jpg"))

    async with MCPClient() as mcp_client:
        for img in images:
            # Edit
            result = await mcp_client.call_tool(
                "edit_image", {"image_path": str(img), "prompt": "enhance quality"}
            )

            if result["status"] == "success":
                print(f"✓ {img.name}")
            else:
                print(f"✗ {img.name}: {result['error']}")

        # Cleanup
        result = await mcp_client.call_tool("offload_gpu", {})
        print(result["message"])


if __name__ == "__main__":
    asyncio.run(automated_workflow(sys.argv[1]))
