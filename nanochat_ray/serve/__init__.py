"""Ray Serve: the engine behind HTTP, with OpenAI's API and a chat page."""
