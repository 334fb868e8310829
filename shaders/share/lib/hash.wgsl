// Integer hashes for weights and ids that share storage: 32-bit, wrapping, the same as share::hashed on the host.

fn mix(a: u32) -> u32 {
    var x = a;
    x = (x ^ (x >> 16u)) * 0x85ebca6bu;
    x = (x ^ (x >> 13u)) * 0xc2b2ae35u;
    return x ^ (x >> 16u);
}

fn hash(x: u32, seed: u32) -> u32 { return mix(x + seed * 0x9e3779b9u); }

fn hash2(a: u32, b: u32, seed: u32) -> u32 { return hash(hash(a, seed) + b, seed); }
