// packed slot: nothing is stored in 16 bits. The other fragments of this slot, f16 and bf16, pack and unpack.
