"""HTTP: the REST routes, OpenAI's Images, and what each request has to pass."""
