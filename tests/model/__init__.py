"""A slow, readable model of stage 2, shadows and invalidation, written from the architecture's rules.

It shares no code with the engine: that is its whole use. Speed never matters here, clarity does.
"""
