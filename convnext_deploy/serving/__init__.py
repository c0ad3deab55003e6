"""The server: artifacts over HTTP, with dynamic batching. `application` is the ASGI application, `server` runs it."""
