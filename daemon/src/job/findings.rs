//! Chunks that the client encoded: what it found goes to its final place, and what could do harm is checked.

use shmquant_kernels::{Affine, Granularity, ZeroPointsMut};
use shmquant_protocol::chunks::{Action, Chunk};
use shmquant_protocol::findings::{self, HEADER, read_ranges};

use super::access::{self, Parts};
use super::{Found, Job, OUTSIDE, Second, Stopped};
use crate::plan::ValuesTarget;

impl Job {
    /// Takes in what crossed of a chunk.
    pub(super) fn found(
        &self,
        chunk: &Chunk,
        target: &ValuesTarget,
        mut access: access::Chunk<'_>,
    ) -> Result<Found, Stopped> {
        let item = chunk.item as usize;
        let (values, spec, _) = self.plan.values(item).ok_or(OUTSIDE)?;
        let affine = spec.affine.ok_or(Stopped::Broken("a layer that stays as it is was encoded"))?;
        let parts = findings::Parts::new(values, spec, &affine, chunk.action, chunk.first, chunk.count);
        if chunk.action == Action::Encode
            && matches!(self.second_pass(item, target, &affine)?, Second::Faulty)
        {
            return Ok(Found::default());
        }
        let mut header = [0; HEADER];
        self.window.read(chunk.at, &mut header).ok_or(OUTSIDE)?;
        let told = findings::Found::from_bytes(&header, chunk.first, chunk.count)
            .ok_or(Stopped::Violation("its counts are not those of its values"))?;
        if let Some(fault) = told.fault {
            return Err(fault.into());
        }
        let mut found = Found { counters: told.counters, sums: told.sums };
        match chunk.action {
            Action::Scan => {
                let ranges = read_ranges(&self.private(chunk, &parts.ranges)?);
                let ranges = ranges.ok_or(Stopped::Violation("a range is no range"))?;
                return self.widen(chunk, target, &ranges);
            }
            Action::Encode => found.counters.n_degenerate_groups = 0,
            _ => {}
        }
        let own = if chunk.action == Action::Fused { parts.touched.clone() } else { 0..0 };
        let mut place = self.parts(chunk, target, &affine, &mut access, own)?;
        self.window.read(chunk.at + parts.codes.start as u64, place.codes).ok_or(OUTSIDE)?;
        if chunk.action == Action::Fused {
            self.found_params(chunk, target, &affine, &parts, &mut place, &mut found)?;
        }
        if !parts.dropped.is_empty() {
            let bits = self.private(chunk, &parts.dropped)?;
            let is_dropped = |row: &u64| {
                let at = row - parts.rows.start;
                bits.get((at / 8) as usize).is_some_and(|byte| byte >> (at % 8) & 1 == 1)
            };
            let dropped: Vec<u64> = parts.rows.clone().filter(is_dropped).collect();
            self.items[item].null_rows(target.layout.rows, &dropped);
        }
        Ok(found)
    }

    /// Parameters of whole domains: to their place, or kept until the end.
    fn found_params(
        &self,
        chunk: &Chunk,
        target: &ValuesTarget,
        affine: &Affine,
        parts: &findings::Parts,
        place: &mut Parts<'_>,
        found: &mut Found,
    ) -> Result<(), Stopped> {
        let bytes = self.private(chunk, &parts.scales)?;
        let scales = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        if !scales.clone().all(|scale| scale > 0.0 && scale < f32::INFINITY) {
            return Err(Stopped::Violation("a scale is not a positive finite number"));
        }
        let mut zeros = self.private(chunk, &parts.zeros)?;
        let zero = |byte: &u8| if affine.signed { i32::from(*byte as i8) } else { i32::from(*byte) };
        if !zeros.iter().map(zero).all(|zero| (affine.qmin..=affine.qmax).contains(&zero)) {
            return Err(Stopped::Violation("a zero point is no code"));
        }
        // A symmetric mapping sends none, but some columns have a place for it.
        zeros.resize(scales.len(), 0);
        let Some(out) = &mut place.scales else {
            debug_assert!(matches!(target.layout.granularity, Granularity::Tensor | Granularity::Dimension));
            let (scales, zeros) = (scales.collect(), zeros.iter().map(zero).collect());
            return self.items[chunk.item as usize].keep(scales, zeros, &mut found.counters);
        };
        out.iter_mut().zip(scales).for_each(|(out, scale)| *out = scale);
        match &mut place.zeros {
            ZeroPointsMut::None => {}
            ZeroPointsMut::I8(out) => out.iter_mut().zip(&zeros).for_each(|(out, zero)| *out = *zero as i8),
            ZeroPointsMut::U8(out) => out.copy_from_slice(&zeros),
            ZeroPointsMut::F32(out) => {
                out.iter_mut().zip(&zeros).for_each(|(out, byte)| *out = zero(byte) as f32);
            }
        }
        Ok(())
    }

    /// A copy of a part of what the client found, which it may still be changing.
    fn private(&self, chunk: &Chunk, part: &std::ops::Range<usize>) -> Result<Vec<u8>, Stopped> {
        let mut bytes = vec![0; part.len()];
        self.window.read(chunk.at + part.start as u64, &mut bytes).ok_or(OUTSIDE)?;
        Ok(bytes)
    }
}
