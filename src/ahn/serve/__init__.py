"""An HTTP server of one model and many memories, for OpenAI clients (docs/serve.md).

app         the application: routes and errors
models, chat, completions, responses, memories, metrics     one part of the interface a file
schema      bodies of requests; unknown fields are refused
prompts     a conversation as token ids: about a memory through recall, else by the chat template
answers     answers of the engine as one response or as events
state       what handlers share: model, engine, memories that are loaded
library     memories on disk, and a journal of what was acknowledged
reading     reads documents into memories, one after the other
keys        API keys, each with memories of its own
"""
