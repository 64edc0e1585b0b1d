"""Keep the model on the GPU for longer: the server that this starts inherits the environment.

python examples/custom_timeout.py
"""

import asyncio
import os

from step1x_edit import MCPClient

# Set custom timeout via environment
os.environ["GPU_IDLE_TIMEOUT"] = "300"  # 5 minutes


async def main() -> None:
    async with MCPClient() as mcp_client:
        status = await mcp_client.call_tool("get_gpu_status", {})
        print(f"Idle timeout: {status['gpu_status']['idle_timeout']} s")


if __name__ == "__main__":
    asyncio.run(main())
