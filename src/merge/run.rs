//! Runs a merge: one tensor at a time from the models' files to the output's.

use super::job::{Input, Job, Output};
use super::method::{Inputs, Measured};
use super::weights::{INDEX, Weights};
use crate::error::{Error, Result};
use crate::files;
use crate::gpu::Gpu;
use crate::gpu::buffer::Reading;
use crate::store::{Entry, FileDType, bf16_bytes, save};
use crate::tensor::Tensor;
use half::f16;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

/// What a folder must hold to be replaced: the configuration that it was made by.
pub const CONFIG: &str = "tiebeam_merge.yaml";

/// Told how many more bytes of the output have been worked on, of [`Job::bytes`] times [`Job::passes`]; an error stops the
/// run and leaves what was there.
pub type Progress<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// A tensor under way: its elements, and for each input how many are not finite.
struct Pending {
    output: usize,
    merged: Reading,
    finite: Vec<(Input, Reading)>,
}

struct Stream<'a> {
    gpu: &'a Gpu,
    job: &'a Job,
    sources: &'a [&'a dyn Weights],
    measured: Measured,
    /// Outputs to come, last first.
    queue: Vec<usize>,
    pending: Option<Pending>,
    progress: &'a mut Progress<'a>,
}

impl Job {
    /// Merges into the folder `out`, reading tensors from `sources`, in the order of [`Job::models`]: [`Job::sources`] or
    /// aligned ones. Shards are filled up to `shard_bytes`; `config` is kept beside them as text.
    ///
    /// The folder appears when it is complete; one that an earlier merge made is replaced, any other is refused. The same
    /// inputs give the same bytes.
    ///
    /// # Errors
    /// [`Job::check`]; NaN or infinity in a model (the message names the tensor and the index) or in the result; what files,
    /// disk and device have, and what `progress` returns. Then `out` is as it was.
    pub fn run(
        &self,
        gpu: &Gpu,
        sources: &[&dyn Weights],
        out: &Path,
        shard_bytes: u64,
        config: &str,
        progress: &mut Progress,
    ) -> Result<()> {
        self.check()?;
        files::replace_folder(out, CONFIG, |folder| {
            let shards = self.shards(shard_bytes);
            let order = |o: &usize| (std::cmp::Reverse(self.outputs[*o].dtype), &self.outputs[*o].name);
            let mut queue = Vec::new();
            for (_, outputs) in &shards {
                // As `store::save` orders a file, so that what is computed ahead is what is asked for next.
                let mut outputs = outputs.clone();
                outputs.sort_by(|a, b| order(a).cmp(&order(b)));
                queue.extend(outputs);
            }
            queue.reverse();
            let (measured, pending) = (Measured::None, None);
            let mut stream =
                Stream { gpu, job: self, sources, measured, queue, pending, progress: &mut *progress };
            stream.measure()?;
            let stream = &RefCell::new(stream);
            let notes = BTreeMap::from([("format".to_string(), "pt".to_string())]);
            for (file, outputs) in &shards {
                let entry = |&i: &usize| {
                    let Output { name, dtype, shape, .. } = &self.outputs[i];
                    Entry::lazy(name.clone(), *dtype, shape, move || stream.borrow_mut().produce(i))
                };
                save(folder.join(file), outputs.iter().map(entry), &notes)?;
            }
            if shards.len() > 1 {
                files::replace_with(&folder.join(INDEX), self.index(&shards))?;
            }
            self.copy_settings(folder)?;
            files::replace_with(&folder.join(CONFIG), config)
        })
    }

    /// The index of shards, with sorted keys.
    fn index(&self, shards: &[(String, Vec<usize>)]) -> String {
        let places = shards.iter().flat_map(|(file, all)| all.iter().map(move |&i| (i, file)));
        let map: BTreeMap<&str, &String> =
            places.map(|(i, file)| (self.outputs[i].name.as_str(), file)).collect();
        format!("{:#}\n", json!({"metadata": {"total_size": self.bytes()}, "weight_map": map}))
    }

    /// Copies the leading model's settings and tokenizer, with the number of layers and the type set to the output's.
    fn copy_settings(&self, folder: &Path) -> Result<()> {
        let from = &self.leader().path;
        let parent = from.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let from = if from.is_dir() { from } else { parent };
        let mut names: Vec<_> = std::fs::read_dir(from)
            .map_err(|e| Error::io(from, e))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| is_setting(name) && from.join(name).is_file())
            .collect();
        names.sort();
        for name in names {
            let path = from.join(&name);
            let mut bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
            if name == "config.json" {
                bytes = self.changed(&path, bytes)?;
            }
            files::replace_with(&folder.join(name), bytes)?;
        }
        Ok(())
    }

    /// A model's settings as the output's.
    fn changed(&self, path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let mut settings: Value =
            serde_json::from_slice(&bytes).map_err(|e| Error::format(path, e.to_string()))?;
        let before = settings.clone();
        let ranges = self.config.slices.iter().map(|s| s.sources[0].layers.as_ref().map(|l| l.len()));
        if let Some(layers) = ranges.sum::<Option<usize>>() {
            let keys = ["num_hidden_layers", "n_layer"].into_iter().filter(|k| before.get(k).is_some());
            keys.for_each(|key| settings[key] = json!(layers));
        }
        if let Some(dtype) = self.config.dtype {
            let word = match dtype {
                FileDType::BF16 => "bfloat16",
                FileDType::F16 => "float16",
                _ => "float32",
            };
            let keys = ["torch_dtype", "dtype"].into_iter().filter(|k| before.get(k).is_some());
            keys.for_each(|key| settings[key] = json!(word));
        }
        Ok(if settings == before { bytes } else { format!("{settings:#}\n").into_bytes() })
    }
}

/// Files of a model's folder that are no weights and belong to every copy of it.
fn is_setting(name: &str) -> bool {
    let tokenizer = name.starts_with("tokenizer") || name.starts_with("vocab") || name == "merges.txt";
    let json = ["config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"];
    tokenizer || json.contains(&name) || name.starts_with("chat_template")
}

impl Stream<'_> {
    fn read(&self, input: &Input) -> Result<Tensor> {
        self.sources[input.model].read(self.gpu, &input.name)
    }

    fn read_all(&self, inputs: &[Input]) -> Result<Vec<Tensor>> {
        inputs.iter().map(|input| self.read(input)).collect()
    }

    fn inputs(&self, output: &Output) -> Result<Inputs> {
        Ok(Inputs {
            base: output.base.as_ref().map(|base| self.read(base)).transpose()?,
            models: self.read_all(&output.models)?,
            fishers: self.read_all(&output.fishers)?,
        })
    }

    /// The passes over all tensors that some methods need first.
    fn measure(&mut self) -> Result<()> {
        let merged: Vec<&Output> = self.job.outputs.iter().filter(|o| o.arguments.is_some()).collect();
        let Some(first) = merged.first() else { return Ok(()) };
        let Some(arguments) = &first.arguments else { return Ok(()) };
        let elements = merged.iter().map(|o| o.count() as u64).sum();
        let method = self.job.config.method;
        let measured = method.measure(arguments, first.models.len(), elements, &mut |visit| {
            for output in &merged {
                let inputs = self.inputs(output)?;
                check_finite(self.job, start_finite(output, &inputs)?)?;
                visit(&inputs)?;
                (self.progress)(output.bytes())?;
            }
            Ok(())
        })?;
        self.measured = measured;
        Ok(())
    }

    /// The bytes of an output, with the next one set going meanwhile.
    fn produce(&mut self, i: usize) -> Result<Vec<u8>> {
        let output = &self.job.outputs[i];
        if self.queue.last() == Some(&i) {
            self.queue.pop();
        }
        let pending = match self.pending.take().filter(|p| p.output == i) {
            Some(pending) => Some(pending),
            None => self.start(i)?,
        };
        if let Some(&next) = self.queue.last() {
            self.pending = self.start(next)?;
        }
        let bytes = match pending {
            Some(pending) => {
                check_finite(self.job, pending.finite)?;
                encode(&output.name, output.dtype, pending.merged.wait()?)?
            }
            None => {
                let from = output.inputs().next().expect("an output has an input");
                self.job.models[from.model].checkpoint.file(&from.name)?.bytes(&from.name)?.to_vec()
            }
        };
        (self.progress)(output.bytes())?;
        Ok(bytes)
    }

    /// Sets an output going; `None` where its bytes are copied.
    fn start(&mut self, i: usize) -> Result<Option<Pending>> {
        let output = &self.job.outputs[i];
        let Some(arguments) = &output.arguments else { return Ok(None) };
        let inputs = self.inputs(output)?;
        let finite = start_finite(output, &inputs)?;
        let method = self.job.config.method;
        let merged = method.merge(&output.name, arguments, &inputs, &mut self.measured)?;
        Ok(Some(Pending { output: i, merged: merged.read::<f32>()?, finite }))
    }
}

fn start_finite(output: &Output, inputs: &Inputs) -> Result<Vec<(Input, Reading)>> {
    let tensors = inputs.base.iter().chain(&inputs.models).chain(&inputs.fishers);
    let one = |(input, x): (&Input, &Tensor)| Ok((input.clone(), x.non_finite().read::<u32>()?));
    output.inputs().zip(tensors).map(one).collect()
}

/// An error that names the first NaN or infinity and how many there are.
fn check_finite(job: &Job, readings: Vec<(Input, Reading)>) -> Result<()> {
    for (input, reading) in readings {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&reading.wait()?);
        if words[0] > 0 {
            let model = &job.models[input.model];
            let (first, more) = (u32::MAX - words[1], words[0] - 1);
            let message =
                format!("tensor `{}` has NaN or infinity at element {first}, and {more} more", input.name);
            return Err(Error::format(&model.path, message));
        }
    }
    Ok(())
}

/// f32 elements as the output's, rounded to nearest even; what is no number there is an error.
fn encode(name: &str, dtype: FileDType, bytes: Vec<u8>) -> Result<Vec<u8>> {
    let values: Vec<f32> = match bytemuck::try_cast_vec(bytes) {
        Ok(values) => values,
        Err((_, bytes)) => bytemuck::pod_collect_to_vec(&bytes),
    };
    // Half an ulp above the largest is where rounding reaches infinity.
    let most = match dtype {
        FileDType::F16 => 65520.0,
        FileDType::BF16 => f32::from_bits(0x7f7f_8000),
        _ => f32::INFINITY,
    };
    if let Some(i) = values.iter().position(|x| x.abs() >= most || x.is_nan()) {
        let x = values[i];
        let hint = if x.is_finite() { "; choose a wider `dtype`" } else { "" };
        return Err(Error::config(format!(
            "merged tensor `{name}`: element {i} is {x}, no number of {dtype}{hint}"
        )));
    }
    Ok(match dtype {
        FileDType::BF16 => bf16_bytes(&values),
        FileDType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => bytemuck::cast_slice(&values).to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoding_rounds_once_and_refuses_what_has_no_number() {
        let encode = |dtype, x: f32| encode("w", dtype, x.to_le_bytes().to_vec());
        assert_eq!(encode(FileDType::F16, 65519.9).unwrap(), [0xff, 0x7b]);
        assert!(encode(FileDType::F16, -65520.0).unwrap_err().to_string().contains("wider `dtype`"));
        assert_eq!(encode(FileDType::BF16, f32::from_bits(0x7f7f_7fff)).unwrap(), [0x7f, 0x7f]);
        assert!(encode(FileDType::BF16, f32::MAX).is_err());
        assert_eq!(encode(FileDType::F32, f32::MAX).unwrap(), f32::MAX.to_le_bytes());
        assert!(encode(FileDType::F32, f32::NAN).is_err() && encode(FileDType::F32, f32::INFINITY).is_err());
        assert_eq!(encode(FileDType::F16, 1.0 + 2f32.powi(-11)).unwrap(), [0x00, 0x3c]);
    }
}
