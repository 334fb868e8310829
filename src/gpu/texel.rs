//! Operands read through textures, for drivers whose loads from storage buffers are slow.
//!
//! llvmpipe (Mesa 22.3) compiles a load from a storage buffer to a loop over lanes that writes and reads back a whole
//! vector for every element. On a Zen 4 core, eight lanes of `vec4<f32>` take about 260 ns, but 24 ns through a texture
//! of the same content. A copy from buffer to texture moves 5 GB/s there, so it pays even for arrays that are read
//! once. Kernels need no change: [`rewrite`] turns `x[i]` into `textureLoad` in the assembled text, and a launch copies
//! the operands first. The results have the same bits.

mod rewrite;

use super::Gpu;
pub(super) use rewrite::rewrite;

/// Texels per row of a texture. With llvmpipe's 16384 rows, a texture holds more than llvmpipe's largest binding.
const WIDTH: u32 = 4096;

/// The bytes that must be loaded from an operand before a copy pays. The copy and the pass that it ends cost about 40
/// us.
const WORTH: u64 = 64 << 10;

/// When operands are read through textures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    Never,
    /// If the copy pays.
    Worth,
    /// Whenever possible, for tests.
    Always,
}

/// The texture format for an array's element type, and the WGSL to read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Texel {
    pub format: wgpu::TextureFormat,
    scalar: &'static str,
    suffix: &'static str,
}

impl Texel {
    fn of(element: &str) -> Option<Texel> {
        use wgpu::TextureFormat as F;
        let texel = |format, scalar, suffix| Some(Texel { format, scalar, suffix });
        match element {
            "f32" => texel(F::R32Float, "f32", ".x"),
            "u32" => texel(F::R32Uint, "u32", ".x"),
            "i32" => texel(F::R32Sint, "i32", ".x"),
            "vec2<f32>" => texel(F::Rg32Float, "f32", ".xy"),
            "vec2<u32>" => texel(F::Rg32Uint, "u32", ".xy"),
            "vec4<f32>" => texel(F::Rgba32Float, "f32", ""),
            "vec4<u32>" => texel(F::Rgba32Uint, "u32", ""),
            _ => None,
        }
    }

    /// Bytes of a texel.
    fn size(self) -> u64 {
        match self.suffix {
            ".x" => 4,
            ".xy" => 8,
            _ => 16,
        }
    }

    pub fn sample_type(self) -> wgpu::TextureSampleType {
        match self.scalar {
            "f32" => wgpu::TextureSampleType::Float { filterable: false },
            "u32" => wgpu::TextureSampleType::Uint,
            _ => wgpu::TextureSampleType::Sint,
        }
    }
}

impl Policy {
    /// Returns a test of an operand's bytes: whether a kernel that loads each element `reuse` times should read it as a
    /// texture. All operands that fit a texture are, or none: a small operand beside a large one, such as a norm's
    /// weight, is loaded as often.
    pub fn chooses(
        self,
        gpu: &Gpu,
        bytes: impl Iterator<Item = u64> + Clone,
        reuse: u32,
    ) -> impl Fn(u64) -> bool {
        let rows = gpu.limits().max_texture_dimension_2d.min(u32::MAX / WIDTH) as u64;
        let fits = move |bytes: u64| bytes <= rows * WIDTH as u64 * 4;
        let pays = match self {
            Policy::Never => false,
            Policy::Worth => bytes.filter(|b| fits(*b)).any(|b| b.saturating_mul(reuse as u64) >= WORTH),
            Policy::Always => reuse > 0,
        };
        move |bytes| pays && fits(bytes)
    }
}

/// A scratch texture. Commands run in order, so one per texel format and place in the kernel is enough.
struct Scratch {
    texture: wgpu::Texture,
    view: wgpu::TextureView,
    texel: Texel,
    place: usize,
}

/// The textures that operands are copied into.
#[derive(Default)]
pub(super) struct Scratches(Vec<Scratch>);

impl Scratches {
    /// Returns the texture for the operand at `place` among a kernel's textures, with room for this many bytes.
    pub fn get(
        &mut self,
        gpu: &Gpu,
        bytes: u64,
        texel: Texel,
        place: usize,
    ) -> (wgpu::Texture, wgpu::TextureView) {
        let height = (bytes / texel.size()).div_ceil(WIDTH as u64) as u32;
        let found = self.0.iter().position(|s| s.texel == texel && s.place == place);
        let index = match found {
            Some(index) if self.0[index].texture.height() >= height => index,
            _ => {
                let texture = texture(gpu, texel, height.next_power_of_two());
                let view = texture.create_view(&wgpu::TextureViewDescriptor::default());
                if let Some(old) = found {
                    self.0.swap_remove(old);
                }
                self.0.push(Scratch { texture, view, texel, place });
                self.0.len() - 1
            }
        };
        (self.0[index].texture.clone(), self.0[index].view.clone())
    }
}

/// A copy of an operand into its texture.
#[derive(Clone)]
pub(super) struct Copy {
    pub from: wgpu::Buffer,
    pub offset: u64,
    pub bytes: u64,
    pub texel: Texel,
    pub texture: wgpu::Texture,
}

impl Copy {
    /// Copies the texels, row by row.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        let Copy { from, texel, texture, .. } = self;
        let count = self.bytes / texel.size();
        let (rows, rest) = ((count / WIDTH as u64) as u32, (count % WIDTH as u64) as u32);
        let pitch = WIDTH * texel.size() as u32;
        for (y, width, height) in [(0, WIDTH, rows), (rows, rest, 1)] {
            if width == 0 || height == 0 {
                continue;
            }
            let offset = self.offset + y as u64 * pitch as u64;
            let layout =
                wgpu::TexelCopyBufferLayout { offset, bytes_per_row: Some(pitch), rows_per_image: None };
            let to = wgpu::TexelCopyTextureInfo {
                origin: wgpu::Origin3d { x: 0, y, z: 0 },
                ..texture.as_image_copy()
            };
            let size = wgpu::Extent3d { width, height, depth_or_array_layers: 1 };
            encoder.copy_buffer_to_texture(wgpu::TexelCopyBufferInfo { buffer: from, layout }, to, size);
        }
    }
}

fn texture(gpu: &Gpu, texel: Texel, height: u32) -> wgpu::Texture {
    gpu.0.device.create_texture(&wgpu::TextureDescriptor {
        label: Some("operand"),
        size: wgpu::Extent3d { width: WIDTH, height, depth_or_array_layers: 1 },
        mip_level_count: 1,
        sample_count: 1,
        dimension: wgpu::TextureDimension::D2,
        format: texel.format,
        usage: wgpu::TextureUsages::TEXTURE_BINDING | wgpu::TextureUsages::COPY_DST,
        view_formats: &[],
    })
}
