"""Print where the model is at regular intervals.

python examples/monitor.py [times] [seconds between]
"""

import asyncio
import sys

from step1x_edit import MCPClient


async def monitor_gpu(times: float = 3, seconds: float = 10) -> None:
    async with MCPClient() as mcp_client:
        for _ in range(int(times)):
            status = await mcp_client.call_tool("get_gpu_status", {})
            print(f"GPU: {status['gpu_status']['model_location']}")
            print(f"Memory: {status['gpu_status']['gpu_memory_allocated_gb']}GB")
            await asyncio.sleep(seconds)


if __name__ == "__main__":
    asyncio.run(monitor_gpu(*map(float, sys.argv[1:])))
