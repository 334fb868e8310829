//! Device time of recorded work by timestamp queries.

use super::{Gpu, lock};
use crate::error::{Error, Result};

impl Gpu {
    /// Whether [`Gpu::time`] tells what work costs. With a CPU driver, host and device share the cores, so only wall
    /// time does.
    pub(crate) fn has_own_clock(&self) -> bool {
        self.has_timestamps() && !self.adapter().is_software()
    }

    /// Returns the seconds that the device spends on what `work` records, measured by timestamps around it.
    ///
    /// Work recorded before is submitted first and does not count.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on adapters without timestamps, else the device's fault.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::ones(&gpu, [64, 64]);
    /// if gpu.has_timestamps() {
    ///     let seconds = gpu.time(|| x.matmul(&x).evaluate())?;
    ///     println!("{:.1} us on {}", seconds * 1e6, gpu.adapter());
    /// }
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn time(&self, work: impl FnOnce()) -> Result<f64> {
        if !self.0.features.contains(wgpu::Features::TIMESTAMP_QUERY) {
            let need = format!("{} has no timestamp queries; measure wall time instead", self.adapter().name);
            return Err(Error::Unsupported { need });
        }
        let device = &self.0.device;
        let set = device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("timer"),
            ty: wgpu::QueryType::Timestamp,
            count: 2,
        });
        self.flush()?;
        self.stamp(&set, 0)?;
        work();
        self.stamp(&set, 1)?;
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("timer"),
            size: 16,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        let staging = self.alloc("timer", 16);
        {
            let mut recorder = lock(&self.0.recorder);
            let encoder = recorder.encoder(self)?;
            encoder.resolve_query_set(&set, 0..2, &buffer, 0);
            if let Ok(raw) = staging.data() {
                encoder.copy_buffer_to_buffer(&buffer, 0, raw, 0, 16);
            }
        }
        let bytes = self.read(&staging, 0, 16)?;
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
        Ok(ticks[1].saturating_sub(ticks[0]) as f64 * self.0.queue.get_timestamp_period() as f64 * 1e-9)
    }

    /// Records an empty pass whose timestamp marks this place in the commands. This also works on adapters whose
    /// encoders cannot write timestamps.
    fn stamp(&self, set: &wgpu::QuerySet, index: u32) -> Result<()> {
        let mut recorder = lock(&self.0.recorder);
        let writes = wgpu::ComputePassTimestampWrites {
            query_set: set,
            beginning_of_pass_write_index: (index == 0).then_some(0),
            end_of_pass_write_index: (index == 1).then_some(1),
        };
        drop(recorder.encoder(self)?.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("timer"),
            timestamp_writes: Some(writes),
        }));
        Ok(())
    }
}
