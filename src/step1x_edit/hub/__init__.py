"""Published models, on the hub and on this disk. Nothing here needs torch."""
