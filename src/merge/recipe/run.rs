//! Runs a merge, one tensor at a time, from the models' files to the output's.

use super::card::CARD;
use super::job::{Input, Job, Output};
use super::method::{Inputs, Measured, Method, Statistics};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::files;
use crate::gpu::Gpu;
use crate::gpu::readback::Reading;
use crate::merge::Weights;
use crate::ranks::{Alone, Ranks, all_done, known, packed, unpacked};
use crate::store::{Entry, FileDType, INDEX, bf16_bytes, index_of, save};
use crate::tensor::Tensor;
use half::f16;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use twox_hash::XxHash3_128;

/// Name of the file in an output folder that holds the folder's configuration.
pub const CONFIG: &str = "tiebeam_merge.yaml";

/// Called with the number of further bytes of the output that are done, of [`Job::bytes`] times [`Job::passes`] in all. An error
/// ends the run and leaves the old output intact.
pub type Progress<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// A part of an output that the device is working on: its bytes, and which elements of the inputs are not finite.
struct Pending {
    merged: Reading,
    finite: Finite,
}

/// For some inputs one after the other, what [`Tensor::non_finite`] says of each.
type Finite = Vec<(Vec<Input>, Reading)>;

/// The numbers of an output and of a part of it.
type Unit = (usize, usize);

struct Stream<'a> {
    gpu: &'a Gpu,
    job: &'a Job,
    sources: &'a [&'a dyn Weights],
    measured: Measured,
    /// The output whose parts are being started, with its statistics.
    statistics: Option<(usize, Statistics)>,
    /// Units that are not yet produced, the next one last.
    queue: Vec<Unit>,
    /// All outputs, in the order in which they are written.
    sequence: Vec<usize>,
    pending: Option<(Unit, Pending)>,
    progress: &'a mut Progress<'a>,
}

impl Job {
    /// Merges into the folder `out`, with tensors from `sources` in the order of [`Job::models`]: [`Job::sources`], or aligned
    /// ones. Shards are filled up to `shard_bytes`, and the text `config` is stored with them.
    ///
    /// The folder appears only when it is complete. A folder of an earlier merge is replaced, and files that others added or
    /// changed there are moved into the new one. Any other folder is refused; [`files::replace_folder`] has the rules. The same
    /// inputs give the same bytes.
    ///
    /// # Errors
    /// Those of [`Job::check`], [`Job::check_out`] and `progress`. Also when a model has NaN or infinity (the message names the
    /// tensor and the index), the result has, or a file, the disk or the device fails. `out` is then left intact.
    pub fn run(
        &self,
        gpu: &Gpu,
        sources: &[&dyn Weights],
        out: &Path,
        shard_bytes: u64,
        config: &str,
        progress: &mut Progress,
    ) -> Result<()> {
        self.run_on(&Alone, gpu, (sources, out), (shard_bytes, config), progress)
    }

    /// [`Job::run`] on several ranks. Each merges its part of the tensors, of nearly as many bytes, and gives them to rank 0, which writes
    /// them: the same bytes as of one rank. What a method measures of all tensors first, every rank measures.
    ///
    /// # Errors
    /// As [`Job::run`]. A rank whose tensor fails tells rank 0, which must end the others.
    pub fn run_on(
        &self,
        ranks: &dyn Ranks,
        gpu: &Gpu,
        (sources, out): (&[&dyn Weights], &Path),
        (shard_bytes, config): (u64, &str),
        progress: &mut Progress,
    ) -> Result<()> {
        self.check()?;
        let (shards, owners) = (self.shards(shard_bytes), self.owners(shard_bytes, ranks.size()));
        if ranks.rank() > 0 {
            let mut stream = self.stream(gpu, sources, shard_bytes, |i| owners[i] == ranks.rank(), progress);
            all_done(ranks, stream.measure())?;
            return stream.give(ranks, &owners);
        }
        self.check_out(out, shard_bytes)?;
        // A card of the user's stays.
        let has_card = !files::is_ours(out, CARD);
        files::replace_folder(out, |folder| {
            let mut stream = self.stream(gpu, sources, shard_bytes, |i| owners[i] == 0, &mut *progress);
            all_done(ranks, stream.measure())?;
            let stream = &RefCell::new(stream);
            let (notes, owners) = (self.file_notes(), &owners);
            for (file, outputs) in &shards {
                let entry = |&i: &usize| {
                    let Output { name, dtype, shape, .. } = &self.outputs[i];
                    Entry::lazy(name.clone(), *dtype, shape, move || match owners[i] {
                        0 => stream.borrow_mut().produce(i),
                        rank => stream.borrow_mut().taken(ranks, rank, i),
                    })
                };
                save(folder.join(file), outputs.iter().map(entry), &notes)?;
            }
            if shards.len() > 1 {
                files::replace_with(&folder.join(INDEX), self.index(&shards))?;
            }
            self.copy_settings(folder)?;
            self.write_card(has_card, folder, config)?;
            files::replace_with(&folder.join(CONFIG), config)
        })
    }

    /// What tells this job from one with other models, for ranks to compare: by model, its tensors and the beginning of each.
    pub fn summary(&self) -> BTreeMap<String, String> {
        let mut hashers: BTreeMap<usize, XxHash3_128> = BTreeMap::new();
        for Output { name, dtype, shape, .. } in &self.outputs {
            hashers.entry(usize::MAX).or_default().write(format!("{name} {dtype} {shape:?}").as_bytes());
        }
        for input in self.outputs.iter().flat_map(Output::inputs) {
            let hasher = hashers.entry(input.model).or_default();
            hasher.write(input.name.as_bytes());
            if let Ok(bytes) = self.models[input.model].checkpoint.bytes(&input.name) {
                hasher.write(&(bytes.len() as u64).to_le_bytes());
                hasher.write(&bytes[..bytes.len().min(4096)]);
            }
        }
        let name = |model: usize| {
            self.models.get(model).map_or("the merge".into(), |m| m.path.display().to_string())
        };
        hashers
            .into_iter()
            .map(|(model, hasher)| (name(model), format!("{:032x}", hasher.finish_128())))
            .collect()
    }

    /// All outputs in the order in which they are written: `store::save` asks for the tensors of a file in this order.
    fn sequence(&self, shard_bytes: u64) -> Vec<usize> {
        let order = |o: &usize| (std::cmp::Reverse(self.outputs[*o].dtype), &self.outputs[*o].name);
        let sorted = |(_, mut outputs): (String, Vec<usize>)| {
            outputs.sort_by(|a, b| order(a).cmp(&order(b)));
            outputs
        };
        self.shards(shard_bytes).into_iter().flat_map(sorted).collect()
    }

    /// The rank that makes each output: in the order of the file, the one that has the fewest bytes to make so far.
    fn owners(&self, shard_bytes: u64, ranks: usize) -> Vec<usize> {
        let (mut owners, mut loads) = (vec![0; self.outputs.len()], vec![0; ranks]);
        for i in self.sequence(shard_bytes) {
            let rank = (0..ranks).min_by_key(|&rank| loads[rank]).unwrap_or(0);
            (owners[i], loads[rank]) = (rank, loads[rank] + self.outputs[i].bytes());
        }
        owners
    }

    /// A stream that computes ahead the outputs that are made here, in the order in which they are asked for.
    fn stream<'a>(
        &'a self,
        gpu: &'a Gpu,
        sources: &'a [&'a dyn Weights],
        shard_bytes: u64,
        is_own: impl Fn(usize) -> bool,
        progress: &'a mut Progress<'a>,
    ) -> Stream<'a> {
        let sequence = self.sequence(shard_bytes);
        // An output that is copied has no parts on the device.
        let parts = |i: usize| if self.outputs[i].arguments.is_some() { self.parts(i).len() } else { 1 };
        let own = sequence.iter().copied().filter(|i| is_own(*i));
        let mut queue: Vec<Unit> = own.flat_map(|i| (0..parts(i)).map(move |p| (i, p))).collect();
        queue.reverse();
        Stream { queue, ..Stream::new(gpu, self, sources, sequence, progress) }
    }

    /// Merges into memory: the tensors that [`Job::run`] writes, with their values rounded to the output's type, in f32. Tensors that
    /// are no floats are left out.
    ///
    /// # Errors
    /// As [`Job::run`], without those of files.
    pub fn merged(&self, gpu: &Gpu, sources: &[&dyn Weights]) -> Result<BTreeMap<String, Tensor>> {
        self.check()?;
        let sequence = (0..self.outputs.len()).collect();
        let mut quiet = |_| Ok(());
        let mut stream = Stream::new(gpu, self, sources, sequence, &mut quiet);
        stream.measure()?;
        let mut all = BTreeMap::new();
        for (i, output) in self.outputs.iter().enumerate() {
            let bytes = stream.produce(i)?;
            let values: Vec<f32> = match output.dtype {
                FileDType::F32 => bytemuck::pod_collect_to_vec(&bytes),
                FileDType::BF16 => from_words(&bytes, |word| half::bf16::from_bits(word).to_f32()),
                FileDType::F16 => from_words(&bytes, |word| f16::from_bits(word).to_f32()),
                _ => continue,
            };
            all.insert(output.name.clone(), Tensor::from_slice(gpu, &values, &output.shape[..]));
        }
        Ok(all)
    }

    /// Checks that [`Job::run`] may write to the folder `out`. Callers use it before other long work.
    ///
    /// # Errors
    /// When `out` is not a folder of this crate, or has a foreign file with the name of one to be written.
    pub fn check_out(&self, out: &Path, shard_bytes: u64) -> Result<()> {
        let shards = self.shards(shard_bytes).into_iter().map(|(file, _)| file);
        // The index is included even if none is written: a foreign index would list other shards than ours.
        let others = [INDEX, CONFIG].map(String::from);
        files::check_folder(out, shards.chain(others).chain(self.settings()?))
    }

    /// The values of an output's first input, in the output's type.
    pub(super) fn copied(&self, i: usize) -> Result<Vec<u8>> {
        let output = &self.outputs[i];
        let from = output.inputs().next().expect("an output has an input");
        let checkpoint = &self.models[from.model].checkpoint;
        if checkpoint.dtype(&from.name)? == output.dtype {
            return Ok(checkpoint.bytes(&from.name)?.to_vec());
        }
        let (file, name) = checkpoint.find(&from.name)?;
        let mut bytes = Vec::with_capacity(output.bytes() as usize);
        for part in self.parts(i) {
            let start = part.start;
            let values = file.range_f32(name, part)?;
            let converted = match output.dtype {
                FileDType::BF16 => bf16_bytes(&values),
                FileDType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
                _ => bytemuck::cast_slice(&values).to_vec(),
            };
            let known = values.iter().filter(|x| !x.is_finite()).count();
            check_encoded(output, start, &converted, known)?;
            bytes.extend(converted);
        }
        Ok(bytes)
    }

    /// Returns the index of shards, with sorted keys.
    pub(super) fn index(&self, shards: &[(String, Vec<usize>)]) -> String {
        let places = shards.iter().flat_map(|(file, all)| all.iter().map(move |&i| (i, file)));
        let map = places.map(|(i, file)| (self.outputs[i].name.as_str(), file.as_str())).collect();
        index_of(map, self.bytes())
    }
}

/// Numbers of 16 bits, in f32.
fn from_words(bytes: &[u8], wide: impl Fn(u16) -> f32) -> Vec<f32> {
    bytes.as_chunks::<2>().0.iter().map(|&word| wide(u16::from_le_bytes(word))).collect()
}

impl<'a> Stream<'a> {
    /// A stream of the outputs in `sequence`, of which none is started before it is asked for.
    fn new(
        gpu: &'a Gpu,
        job: &'a Job,
        sources: &'a [&'a dyn Weights],
        sequence: Vec<usize>,
        progress: &'a mut Progress<'a>,
    ) -> Stream<'a> {
        Stream {
            gpu,
            job,
            sources,
            measured: Measured::None,
            statistics: None,
            queue: Vec::new(),
            sequence,
            pending: None,
            progress,
        }
    }

    fn read(&self, input: &Input, range: &Range<usize>) -> Result<Tensor> {
        self.sources[input.model].read_range(self.gpu, &input.name, range.clone())
    }

    fn inputs(&self, output: &Output, range: &Range<usize>) -> Result<Inputs> {
        let all =
            |inputs: &[Input]| inputs.iter().map(|input| self.read(input, range)).collect::<Result<_>>();
        Ok(Inputs {
            base: output.base.as_ref().map(|base| self.read(base, range)).transpose()?,
            models: all(&output.models)?,
            others: all(&output.others)?,
        })
    }

    /// Reads pieces of the base's tensor and of the models' tensors to the host. `None` if a source has none.
    fn sample(&self, output: &Output, length: usize, starts: &[usize]) -> Result<Option<[Vec<Vec<f32>>; 2]>> {
        let one = |input: &Input| self.sources[input.model].sample(&input.name, length, starts);
        let base: Option<Vec<_>> = output.base.iter().map(one).collect::<Result<_>>()?;
        let models: Option<Vec<_>> = output.models.iter().map(one).collect::<Result<_>>()?;
        Ok(base.filter(|base| !base.is_empty()).zip(models).map(|(base, models)| [base, models]))
    }

    /// Makes the passes over all tensors that some methods need first.
    fn measure(&mut self) -> Result<()> {
        let merged: Vec<&Output> = self.job.outputs.iter().filter(|o| o.arguments.is_some()).collect();
        let Some((first, arguments)) = merged.first().and_then(|o| Some((o, o.arguments.as_ref()?))) else {
            return Ok(());
        };
        let elements = merged.iter().map(|o| o.count() as u64).sum();
        let method = self.job.config.method;
        let measured = method.measure(arguments, first.models.len(), elements, &mut |visit| {
            // In the order of the merge, since of equal elements at a cut the last ones are kept.
            for &i in &self.sequence {
                let output = &self.job.outputs[i];
                let parts = if output.arguments.is_some() { self.job.parts(i) } else { Vec::new() };
                for range in parts {
                    let inputs = self.inputs(output, &range)?;
                    check_finite(self.job, start_finite(output, &inputs)?, range.start)?;
                    visit(&inputs)?;
                }
                (self.progress)(output.bytes())?;
            }
            Ok(())
        })?;
        self.measured = measured;
        Ok(())
    }

    /// Returns the bytes of an output. Before each wait for a part, the next part is started.
    fn produce(&mut self, i: usize) -> Result<Vec<u8>> {
        let output = &self.job.outputs[i];
        let mut all = Vec::new();
        for (part, range) in self.job.parts(i).into_iter().enumerate() {
            if self.queue.last() == Some(&(i, part)) {
                self.queue.pop();
            }
            let pending = match self.pending.take() {
                Some((unit, pending)) if unit == (i, part) => Some(pending),
                _ => self.start((i, part))?,
            };
            if let Some(&next) = self.queue.last() {
                self.pending = self.start(next)?.map(|pending| (next, pending));
            }
            let Some(pending) = pending else {
                all = self.job.copied(i)?;
                break;
            };
            let (method, finite, start) = (self.job.config.method, pending.finite, range.start);
            // What is passed through is nobody's sum, if there is no adapter on it: NaN and infinity stay what they were.
            let known = match method {
                Method::Passthrough
                    if !output.inputs().any(|input| self.job.models[input.model].is_adapted(&input.name)) =>
                {
                    counted(finite)?
                }
                _ => check_finite(self.job, finite, start).map(|()| 0)?,
            };
            let bytes = pending.merged.wait()?;
            check_encoded(output, start, &bytes, known)?;
            all.extend(bytes);
        }
        (self.progress)(output.bytes())?;
        Ok(all)
    }

    /// Makes the outputs of this rank in their order and gives them to rank 0.
    fn give(mut self, ranks: &dyn Ranks, owners: &[usize]) -> Result<()> {
        for i in self.sequence.clone() {
            if owners[i] != ranks.rank() {
                continue;
            }
            let made = self.produce(i);
            let failed = made.as_ref().err().cloned();
            ranks.send(&packed(made))?;
            if let Some(error) = failed {
                // Rank 0 says it, once what it has begun to write is gone, and ends the others.
                return known(ranks, Err(error));
            }
        }
        Ok(())
    }

    /// Takes an output from the rank that makes it.
    fn taken(&mut self, ranks: &dyn Ranks, rank: usize, i: usize) -> Result<Vec<u8>> {
        let bytes = unpacked(rank, ranks.receive(rank)?)?;
        let output = &self.job.outputs[i];
        if bytes.len() as u64 != output.bytes() {
            let (name, got) = (&output.name, bytes.len());
            return Err(Error::config(format!(
                "rank {rank} made `{name}` of {got} bytes, not {}",
                output.bytes()
            )));
        }
        (self.progress)(output.bytes())?;
        Ok(bytes)
    }

    /// Starts a part on the device. `None` if the output's values are copied instead.
    fn start(&mut self, (i, part): Unit) -> Result<Option<Pending>> {
        let output = &self.job.outputs[i];
        let Some(arguments) = &output.arguments else { return Ok(None) };
        let (method, name, parts) = (self.job.config.method, &output.name, self.job.parts(i));
        let inputs = self.inputs(output, &parts[part])?;
        let mut statistics = match self.statistics.take() {
            Some((of, statistics)) if of == i && part > 0 => statistics,
            _ => {
                // The part that is merged next is here already. It is the first one.
                let mut each = |visit: &mut dyn FnMut(&Inputs) -> Result<()>| {
                    parts.iter().enumerate().try_for_each(|(p, range)| match p == part {
                        true => visit(&inputs),
                        false => visit(&self.inputs(output, range)?),
                    })
                };
                let sample = |length: usize, starts: &[usize]| self.sample(output, length, starts);
                method.statistics(name, output.count(), arguments, output.models.len(), &mut each, &sample)?
            }
        };
        let merged = method.merge(name, part, arguments, &inputs, &mut statistics, &mut self.measured)?;
        self.statistics = Some((i, statistics));
        let finite = match merged.finite {
            Some(finite) => vec![(output.inputs().cloned().collect(), finite.read::<u32>()?)],
            None => start_finite(output, &inputs)?,
        };
        let merged = merged.tensor;
        let merged = match output.dtype {
            FileDType::BF16 => merged.read_bf16()?,
            FileDType::F16 => merged.cast(DType::F16).read::<f16>()?,
            _ => merged.read::<f32>()?,
        };
        Ok(Some(Pending { merged, finite }))
    }
}

fn start_finite(output: &Output, inputs: &Inputs) -> Result<Finite> {
    let tensors = inputs.base.iter().chain(&inputs.models).chain(&inputs.others);
    let one = |(input, x): (&Input, &Tensor)| Ok((vec![input.clone()], x.non_finite().read::<u32>()?));
    output.inputs().zip(tensors).map(one).collect()
}

/// Number of elements of a part's inputs that are not finite.
fn counted(finite: Finite) -> Result<usize> {
    let counts = finite.into_iter().map(|(_, reading)| {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&reading.wait()?);
        Ok(words.iter().step_by(2).map(|&count| count as usize).sum::<usize>())
    });
    counts.sum()
}

/// Checks the inputs of a part that begins at element `start`. The error names the first NaN or infinity and counts the others.
fn check_finite(job: &Job, readings: Finite, start: usize) -> Result<()> {
    for (inputs, reading) in readings {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&reading.wait()?);
        let wrong = inputs.iter().zip(words.chunks(2)).find(|(_, words)| words[0] > 0);
        if let Some((input, words)) = wrong {
            let model = &job.models[input.model];
            let (first, more) = (start + (u32::MAX - words[1]) as usize, words[0] - 1);
            let message =
                format!("tensor `{}` has NaN or infinity at element {first}, and {more} more", input.name);
            return Err(Error::format(&model.path, message));
        }
    }
    Ok(())
}

/// Checks the result of a part that begins at element `start`. NaN, and values that the output's type rounds to infinity, are
/// errors, unless there are no more than the `known` ones of the input.
fn check_encoded(output: &Output, start: usize, bytes: &[u8], known: usize) -> Result<()> {
    /// Returns the index of the first element for which `bad` is true, if there are more than `known`.
    fn first<const N: usize>(bytes: &[u8], known: usize, bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
        let elements = bytes.as_chunks::<N>().0;
        // Counting first runs at memory speed. A search with an early exit does not, and usually there is nothing to find.
        let count: usize = elements.iter().map(|&e| usize::from(bad(e))).sum();
        (count > known).then(|| elements.iter().position(|&e| bad(e))).flatten()
    }
    let at = match output.dtype {
        FileDType::BF16 => first(bytes, known, |e| u16::from_le_bytes(e) & 0x7f80 == 0x7f80),
        FileDType::F16 => first(bytes, known, |e| u16::from_le_bytes(e) & 0x7c00 == 0x7c00),
        _ => first(bytes, known, |e| u32::from_le_bytes(e) & 0x7f80_0000 == 0x7f80_0000),
    };
    match at {
        None => Ok(()),
        Some(i) => Err(Error::config(format!(
            "merged tensor `{}`: element {} is no number of {}; look at the parameters, or choose a wider `dtype`",
            output.name,
            start + i,
            output.dtype
        ))),
    }
}
