"""Answers over HTTP: the API that clients of OpenAI speak, and a page to chat on."""
