"""Every request and every answer: names, ranges, defaults and descriptions."""
