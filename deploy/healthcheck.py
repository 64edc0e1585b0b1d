"""Exits with 0 if the server of this container is ready, else with 1 and the reason.

It reads the same PORT and API_KEY as the server, and needs no package.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

url = f"http://127.0.0.1:{os.environ.get('PORT', '8000')}/readyz"
request = urllib.request.Request(url)
if key := os.environ.get("API_KEY"):
    request.add_header("Authorization", f"Bearer {key}")
try:
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=4)
except urllib.error.HTTPError as error:
    sys.exit(f"{url}: {error.code}\n{error.read(1000).decode(errors='replace')}")
except OSError as error:
    sys.exit(f"{url}: {error}")
