"""An HTTP server of one model and many memories, for OpenAI clients (docs/serve.md).

app         the application: routes and errors
models, chat, completions, responses, memories, metrics     one part of the interface a file
schema      bodies of requests; unknown fields are refused
prompts     a conversation as token ids: about a memory through recall, else by the chat template
answers     answers of the engine as one response or as events
state       what handlers share: model, engine, memories that are loaded
kept        responses that can be gone on from
access      whose memories a request may use
gate        checks made before a body is read
keys        API keys, each with memories of its own
library     memories on disk, by owner
journal     lines that are on disk before they count
uploads     bytes of requests on their way to the disk
texts       documents as token ids, with their places
reading     reads what waits into its memories
settings    limits
errors      errors as OpenAI clients expect them
"""
