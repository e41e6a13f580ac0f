"""The Ray Serve application: the trained policy and its reward model behind OpenAI-compatible HTTP.

`protocol` holds what travels over HTTP, `engine` the two deployments around vLLM, `gateway` the HTTP ingress
(with `guard` around it and `calls` below it), `app` what starts them all on Ray Serve.
"""
