"""Hostile inputs for every door of Stagecraft, made from good ones, and what a door must do with them.

- door.py: what a door is, and how it may answer
- mutations.py: good bytes, texts and JSON made bad; tensors.py: the same for safetensors bodies
- http_text.py: a request as bytes that can be kept, sent and replayed; asgi.py asks an application with it
- ..._doors.py: the doors themselves; catalogue.py lists them
- campaign.py: many inputs in a process that is watched for hangs, deaths and memory
"""
