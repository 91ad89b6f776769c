"""How passes are computed on a device.

passes        passes of fixed composition, in which a sample depends on no other
precision     number formats of encoders, decoders and extractors
peak          FLOP/s of a device in matrix products
"""
