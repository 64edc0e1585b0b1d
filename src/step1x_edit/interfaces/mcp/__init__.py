"""MCP: the tools, over stdio and HTTP, and the clients of such servers."""
