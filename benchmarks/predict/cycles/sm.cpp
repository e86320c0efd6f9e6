// One streaming multiprocessor (SM) that replays the traces of its programs cycle by cycle.
//
// Four schedulers issue one instruction per cycle each, the warp that issued last first, then the oldest. An instruction
// waits for the stall count of the one before it, for its scoreboards (both are in the machine code), for its pipe, and
// for its first fetch. Memory instructions queue for the L1's tag stage and data port, their misses for the SM's port to
// the L2, for the SM's share of the L2's bandwidth and, where the data is in DRAM, for its share of that. Programs start
// one after another as others end. sm.py compiles this file and calls simulate(); machines.py has the constants.
#include "sm.h"

#include <cmath>
#include <deque>
#include <queue>

namespace {

struct Warp {
    Warp(int64_t program, const Step* next, const Step* end, Cycle ready)
        : program(program), next(next), end(end), ready(ready) {}

    int64_t program;
    const Step *next, *end;
    Cycle ready;
    std::array<int, SCOREBOARDS> open{};  // operations not yet complete
    bool at_barrier = false;
    std::deque<Cycle> groups;  // when each closed wgmma group is complete
    Cycle tensor_until = 0, copies_until = 0;
};

struct Release {
    Cycle at;
    int64_t warp;
    int scoreboard;
    bool operator<(const Release& other) const { return at > other.at; }  // the earliest on top
};

// A resource that serves one request after another: when a request that arrives at `at` begins, and the next one can.
struct Server {
    double free = 0, busy = 0;
    double serve(double at, double duration) {
        double begin = std::max(at, free);
        free = begin + duration;
        busy += duration;
        return begin;
    }
};

class Sm {
  public:
    explicit Sm(const Input& given)
        : in(given), m(given.machine), l1(given.machine.l1_bytes), l2_rate(m.l2_rate), dram_rate(m.dram_rate),
          fetched(given.instruction_count / 8 + 1, NEVER), remaining(given.programs) {
        warps.reserve(in.programs * in.warps);
        for (int64_t i = 0; i < in.resident; i++) start_program(0);
    }

    bool run(Result& result) {
        while (remaining > 0) {
            if (now > LONGEST) return false;
            for (; !releases.empty() && releases.top().at <= now; releases.pop())
                warps[releases.top().warp].open[releases.top().scoreboard]--;
            bool any = false;
            wake = NEVER;
            for (int q = 0; q < SCHEDULERS; q++) any |= schedule(q);
            if (any) {
                now++;
                continue;
            }
            Cycle next = releases.empty() ? wake : std::min(wake, releases.top().at);
            if (next == NEVER) return false;  // every warp waits for another
            now = std::max(now + 1, next);
        }
        double end = std::max({double(now), l2.free, dram.free});  // the last stores
        result = {double(now), end, issued, tensor_cycles / 4, l2_bytes, dram_read, dram_written, hits, misses,
                  data_port.busy, alu_busy / 4, fma_busy / 4, xu_busy / 4, lsu_busy / 4, shared.busy, tag_stage.busy};
        return true;
    }

  private:
    void start_program(Cycle at) {
        if (started >= in.programs) return;
        at = std::max(at, next_start);
        next_start = at + Cycle(m.start_interval);
        int64_t program = started++;
        arrived.push_back(0);
        left.push_back(in.warps);
        for (int64_t w = 0; w < in.warps; w++) {
            Warp warp(program, in.steps + in.first_step[w], in.steps + in.first_step[w + 1], at + 2 * w);
            queues[(program * in.warps + w) % SCHEDULERS].push_back(warps.size());
            warps.push_back(std::move(warp));
        }
    }

    bool schedule(int q) {
        int64_t chosen = -1;
        if (last[q] >= 0 && can_issue(last[q], q)) {
            chosen = last[q];
        } else {
            for (int64_t w : queues[q])
                if (can_issue(w, q)) {
                    chosen = w;
                    break;
                }
        }
        if (chosen < 0) return false;
        last[q] = chosen;
        issue(chosen, q);
        return true;
    }

    bool later(double at) {  // not now: look again then
        wake = std::min(wake, Cycle(std::ceil(at)));
        return false;
    }

    bool can_issue(int64_t index, int q) {
        Warp& w = warps[index];
        if (w.at_barrier) return false;
        if (w.ready > now) return later(w.ready);
        const Instruction& i = in.instructions[w.next->instruction];
        for (int b = 0; b < SCOREBOARDS; b++)
            if ((i.wait >> b & 1) && w.open[b] > 0) return false;
        if (i.kind == WAIT_SCOREBOARD && w.open[i.barrier] > i.amount) return false;
        if (i.kind == WAIT_WGMMA) {
            while (!w.groups.empty() && w.groups.front() <= now) w.groups.pop_front();
            if (int64_t(w.groups.size()) > i.amount) return later(w.groups[w.groups.size() - 1 - i.amount]);
        }
        if (m.fetch_cycles > 0) {
            Cycle& there = fetched[w.next->instruction / 8];
            if (there == NEVER) there = fetch_free = std::max(fetch_free, now) + Cycle(m.fetch_cycles);
            if (there > now) return later(there);
        }
        double free = pipe_free(i, w.next->access, q);
        return free > now ? later(free) : true;
    }

    double pipe_free(const Instruction& i, int32_t access, int q) const {
        switch (i.pipe) {
            case ALU: return alu[q];
            case FMA: return m.fma_pipes > 1 ? std::min(fma[q], fma_heavy[q]) : fma[q];
            case FMA_HEAVY: return fma_heavy[q];
            case XU: return xu[q];
            case FP64: return fp64;
            case TENSOR: return i.kind == MMA ? tensor[q] : 0;
            case LSU: {
                if (access == NOT_EXECUTED) return 0;
                double free = lsu[q];  // the queues in front of the L1 are of limited depth
                if (data_port.free > now + 96) free = std::max(free, data_port.free - 96);
                if (tag_stage.free > now + 64) free = std::max(free, tag_stage.free - 64);
                return free;
            }
            default: return 0;
        }
    }

    void occupy_pipe(const Instruction& i, bool executed, int q) {
        switch (i.pipe) {
            case ALU: alu[q] = now + m.alu_cycles, alu_busy += m.alu_cycles; break;
            case FMA:
                if (m.fma_pipes > 1) {
                    (fma[q] <= now ? fma[q] : fma_heavy[q]) = now + 2;
                    fma_busy += 1;
                } else {
                    fma[q] = now + m.fma_cycles, fma_busy += m.fma_cycles;
                }
                break;
            case FMA_HEAVY:
                fma_heavy[q] = now + m.fma_heavy_cycles;
                fma_busy += m.fma_pipes > 1 ? 1 : m.fma_heavy_cycles;
                break;
            case XU: xu[q] = now + m.xu_cycles, xu_busy += m.xu_cycles; break;
            case LSU:
                if (executed) lsu[q] = now + 4, lsu_busy += 4;
                break;
            case FP64: fp64 = now + m.fp64_cycles; break;
            default: break;
        }
    }

    void issue(int64_t index, int q) {
        Warp& w = warps[index];
        const Step step = *w.next++;
        const Instruction& i = in.instructions[step.instruction];
        const bool executed = step.access != NOT_EXECUTED;
        issued++;
        w.ready = now + std::max(1, i.stall);
        occupy_pipe(i, executed, q);
        result_at = now + 10, sources_at = now + 6;
        if (executed) {
            const Access* access = step.access >= 0 ? &in.accesses[step.access] : nullptr;
            execute(w, i, access, step, q);
        }
        hold(index, i.write_barrier, result_at);
        hold(index, i.read_barrier, sources_at);
        if (i.kind == BARRIER) {
            w.at_barrier = true;
            arrived[w.program]++;
            open_barrier(w.program);
        }
        if (w.next == w.end) end_warp(index, q);
    }

    void hold(int64_t warp, int scoreboard, Cycle until) {
        if (scoreboard >= SCOREBOARDS) return;
        warps[warp].open[scoreboard]++;
        releases.push({std::max(until, now + 1), warp, scoreboard});
    }

    void open_barrier(int64_t program) {
        if (left[program] == 0 || arrived[program] < left[program]) return;
        arrived[program] = 0;
        for (int64_t w = program * in.warps; w < (program + 1) * in.warps; w++)
            if (warps[w].at_barrier) {
                warps[w].at_barrier = false;
                warps[w].ready = std::max(warps[w].ready, now + 16);
            }
    }

    void end_warp(int64_t index, int q) {
        int64_t program = warps[index].program;
        queues[q].erase(std::find(queues[q].begin(), queues[q].end(), index));
        last[q] = -1;
        left[program]--;
        open_barrier(program);
        if (left[program] > 0) return;
        if (--remaining <= m.tail_programs) {  // other SMs are idle: more of the shared bandwidth is for this one
            l2_rate = m.tail_l2_rate, dram_rate = m.tail_dram_rate;
            if (l2.free > now) l2.free = now + (l2.free - now) * 0.5;
        }
        start_program(now + 30);
    }

    void execute(Warp& w, const Instruction& i, const Access* access, const Step& step, int q) {
        switch (i.kind) {
            case LONG_RESULT: result_at = now + 18; break;
            case SPECIAL: result_at = now + 25; break;
            case CONSTANT: result_at = now + 30; break;
            case SHUFFLE: {
                Cycle begin = Cycle(data_port.serve(now, 1));
                result_at = begin + 24, sources_at = begin + 8;
                break;
            }
            case SHARED_LOAD:
            case SHARED_STORE: {
                int wavefronts = access ? access->wavefronts : 1;
                double end = data_port.serve(now + 4, wavefronts) + wavefronts;
                shared.serve(now, wavefronts);
                result_at = Cycle(end) + Cycle(m.shared_latency) - 4, sources_at = Cycle(end) + 4;
                break;
            }
            case LOAD:
            case COPY_ASYNC:
                if (access) load(w, i.kind == COPY_ASYNC, *access);
                else result_at = now + 20, sources_at = now + 12;
                break;
            case STORE:
                if (access) store(w, *access);
                break;
            case CLOSE_COPIES: result_at = std::max(w.copies_until, now + 4); break;
            case FENCE:
                result_at = now + 20;
                w.ready = std::max(w.ready, now + i.amount);
                break;
            case WGMMA: wgmma(w, i, q); break;
            case MMA:
                tensor[q] = std::max(tensor[q], double(now)) + m.mma_cycles * i.amount;
                tensor_cycles += m.mma_cycles * i.amount;
                result_at = now + 33;
                break;
            case BRANCH:
                if (w.next != w.end && w.next->instruction != step.instruction + 1) w.ready = std::max(w.ready, now + 10);
                break;
            default: break;
        }
    }

    void load(Warp& w, bool to_shared, const Access& a) {
        double begin = tag_stage.serve(now + 6, a.tags);
        if (!to_shared) begin = data_port.serve(begin + a.tags - 1, a.wavefronts);
        double read = begin + a.wavefronts;
        Cycle done = Cycle(read) + Cycle(m.l1_latency) - 8;
        const Tensor& tensor_read = in.tensors[std::max(a.tensor, 0)];
        // The trace is one program's: another one's sectors are others, unless all programs read the same.
        int64_t other = a.tensor >= 0 && !tensor_read.same_for_all ? w.program << 36 : 0;
        double share = a.tensor >= 0 ? tensor_read.dram_share : 0;
        int missed = 0;
        for (int64_t s = a.first; s < a.first + a.count; s++) {
            int64_t sector = in.sectors[s] + other;
            if (!a.bypass) {
                Cycle there = l1.find(sector);
                if (there != NEVER) {
                    hits++;
                    done = std::max(done, there);
                    continue;
                }
                misses++;
            }
            missed++;
            Cycle arrival = fetch(read + 8, random() < share);
            if (!a.bypass) l1.fill(sector, arrival);
            done = std::max(done, arrival);
        }
        if (missed) {  // what arrives is written through the data port
            double cycles = missed * double(SECTOR) / LINE * (to_shared ? 1.0 : 0.5);
            data_port.free += cycles, data_port.busy += cycles;
            if (to_shared) shared.serve(now, cycles);
        }
        result_at = done, sources_at = Cycle(read) + 8;
        if (to_shared) w.copies_until = std::max(w.copies_until, done + 4);
    }

    Cycle fetch(double at, bool from_dram) {
        port.serve(at, SECTOR / m.port_rate);
        l2.serve(at, SECTOR / l2_rate);
        double arrival = std::max(l2.free, port.free) + m.l2_latency - 40;
        l2_bytes += SECTOR;
        if (from_dram) {
            dram.serve(at, SECTOR / dram_rate);
            arrival = std::max(arrival, dram.free + m.dram_latency - 40);
            dram_read += SECTOR;
        }
        return Cycle(arrival);
    }

    void store(Warp& w, const Access& a) {
        double begin = data_port.serve(tag_stage.serve(now + 6, a.tags), a.wavefronts);
        double bytes = double(SECTOR) * a.count;
        l2.serve(begin, bytes / l2_rate);
        l2_bytes += bytes;
        if (a.tensor >= 0 && in.tensors[a.tensor].stored_to_dram) {
            dram.serve(begin, bytes / dram_rate);
            dram_written += bytes;
            if (dram.free > now + 1500) w.ready = std::max(w.ready, Cycle(dram.free - 1500));
        }
        result_at = sources_at = Cycle(begin + a.wavefronts) + 12;
        if (l2.free > now + 800) w.ready = std::max(w.ready, Cycle(l2.free - 800));
    }

    void wgmma(Warp& w, const Instruction& i, int q) {
        // 64 rows x amount columns x 16: each scheduler computes 16 rows, and fetches a quarter of the operands.
        double cycles = std::max(i.amount / 2.0, 16.0), duration = cycles * (i.eight_bit ? 0.5 : 1.0);
        double operands = ((i.from_registers ? 0 : 16) + i.amount / 4.0) / 4;
        double begin = std::max({double(now) + (w.tensor_until > now ? 0 : m.wgmma_start), tensor[q], double(w.tensor_until)});
        double read = shared.serve(begin, operands) + operands;
        duration = std::max(duration, read - begin);
        tensor[q] = begin + duration;
        tensor_cycles += cycles * (i.eight_bit ? 0.5 : 1.0);
        w.tensor_until = Cycle(begin + duration);
        if (i.closes_group) w.groups.push_back(w.tensor_until + Cycle(m.wgmma_latency));
        if (begin > now + 512) w.ready = std::max(w.ready, Cycle(begin - 512));  // it runs ahead by a few only
    }

    double random() {  // in [0, 1), the same in every run
        state = state * 1664525u + 1013904223u;
        return (state >> 8) * (1.0 / 16777216.0);
    }

    const Input& in;
    const Machine& m;
    L1 l1;
    double l2_rate, dram_rate;
    std::vector<Cycle> fetched;  // per 8 instructions
    std::vector<Warp> warps;
    std::array<std::vector<int64_t>, SCHEDULERS> queues;
    std::array<int64_t, SCHEDULERS> last{-1, -1, -1, -1};
    std::priority_queue<Release> releases;
    std::vector<int64_t> arrived, left;  // per program: warps at the barrier, warps not ended
    int64_t started = 0, remaining;
    Cycle now = 0, wake = NEVER, next_start = 0, fetch_free = 0, result_at = 0, sources_at = 0;
    std::array<double, SCHEDULERS> alu{}, fma{}, fma_heavy{}, xu{}, lsu{}, tensor{};
    double fp64 = 0;
    Server data_port, tag_stage, shared, port, l2, dram;
    double issued = 0, tensor_cycles = 0, alu_busy = 0, fma_busy = 0, xu_busy = 0, lsu_busy = 0;
    double l2_bytes = 0, dram_read = 0, dram_written = 0, hits = 0, misses = 0;
    uint32_t state = 12345;
};

}  // namespace

// 0 for success, 1 if the programs never end.
extern "C" int simulate(const Machine* machine, const Instruction* instructions, int64_t instruction_count,
                        const Access* accesses, const Tensor* tensors, const int64_t* sectors, const Step* steps,
                        const int64_t* first_step, int64_t warps, int64_t programs, int64_t resident, Result* result) {
    Input input{*machine, instructions, accesses, tensors, sectors, steps, first_step, instruction_count, warps, programs,
                resident};
    return Sm(input).run(*result) ? 0 : 1;
}
