"""``/v1/responses``: OpenAI's newer API, answered by the chat path.

A request becomes a chat's (``request``, ``items``), and a chat's parts become items and events
(``output``, ``reply``).
"""
